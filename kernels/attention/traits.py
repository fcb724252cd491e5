"""What the attention kernels are compiled for."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton.language as tl


class AttentionTraits(NamedTuple):
    """Compile-time constants of an attention kernel, `T` in its code. Features that are off cost nothing."""

    D: int  # head dim
    PART_WIDTHS: tuple[int, ...]  # the head dim in parts of these widths, powers of two
    PART_STARTS: tuple[int, ...]  # first column of each part
    N_PARTS: int
    BLOCK_M: int  # rows of a tile
    BLOCK_N: int  # keys of a tile
    KEY_TENSORS: int  # 1: all keys lie in one tensor; else one tensor for each key segment
    HEADS_PER_KV: int  # query heads that share one head of keys and values
    ALIGN: int  # power of two that divides every stride
    DESCRIPTORS: bool  # full tiles of keys and values are read through tensor descriptors (TMA)
    RAGGED: bool  # batch items differ in their number of blocks
    GROUPED: bool  # several softmax groups
    MIXED: bool  # some key ranges hold several short segments: each key has its own bias and weight
    # weights of 0 or a contrast with clip: tiles may count in max and sum without a P V product
    SKIP_PV: bool
    LINEAR_CONTRAST: bool  # some group has a contrast without clip
    CLIPPED_CONTRAST: bool  # some group has a contrast with clip: a second sweep over its keys
    NEGATIVE_SCALE: bool  # the scale may be negative
    MASS_WIDTH: int  # key segments of the mass, rounded up to a power of two; 0: no mass
    PRECISION: str  # of float32 products: tl.dot's input_precision
    EMULATE_BF16: bool  # bfloat16 in the interpreter, which would compute on its bits

    def constants(self) -> AttentionTraits:
        """The same traits with every field a tl.constexpr.

        Triton 3.6 and 3.7 read a plain field of a constant NamedTuple as a run-time number.
        """
        return _constants(self)


@functools.lru_cache(1024)
def _constants(traits: AttentionTraits) -> AttentionTraits:
    wrapped = (tuple(map(tl.constexpr, x)) if isinstance(x, tuple) else tl.constexpr(x) for x in traits)
    return AttentionTraits(*wrapped)

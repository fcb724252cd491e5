"""What the launches of the Triton kernels over segments share: traits, pieces of keys, starts, small constant
tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...core.problem import Problem
from ..gpu.constants import constant, starts
from ..gpu.device import interpreted

if TYPE_CHECKING:
    from ....kernels.attention.blocks import Traits
    from ....kernels.attention.tiles import Tile

SHORT = 32  # keys: neighbouring segments below it share tiles, which would be padding for the most part


class Pieces(NamedTuple):
    """The keys as the kernels walk them: one piece per segment, but for runs of short segments, which are one
    piece.
    """

    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    segments: tuple[int, ...]  # -1: several
    labels: tuple[int, ...]  # segment of each key; empty where the pieces are the segments

    @classmethod
    @functools.lru_cache(1024)
    def of_segments(cls, lengths: tuple[int, ...], groups: tuple[int, ...]) -> Pieces:
        return cls(lengths, groups, tuple(range(len(lengths))), ())

    @classmethod
    @functools.lru_cache(1024)
    def joining(cls, lengths: tuple[int, ...], groups: tuple[int, ...]) -> Pieces:
        """Neighbours of one group below SHORT keys as one piece."""
        runs: list[list[int]] = []
        for (is_short, _), neighbours in groupby(
            range(len(lengths)), lambda c: (lengths[c] < SHORT, groups[c])
        ):
            run = list(neighbours)
            runs += [run] if is_short else [[c] for c in run]
        if len(runs) == len(lengths):
            return cls.of_segments(lengths, groups)
        return cls(
            tuple(sum(lengths[c] for c in run) for run in runs),
            tuple(groups[run[0]] for run in runs),
            tuple(run[0] if len(run) == 1 else -1 for run in runs),
            tuple(c for c, length in enumerate(lengths) for _ in range(length)),
        )

    @classmethod
    def of(cls, p: Problem, per_segment: bool) -> Pieces:
        """per_segment: something is wanted of each segment, so that none may share a tile."""
        together = not per_segment and len(p.k) == 1 and p.key_items is None and p.valid is None
        together = together and (p.bias is not None or p.weight is not None)
        return (cls.joining if together else cls.of_segments)(p.key_lengths, p.groups)


def make_traits(p: Problem, tile: Tile, pieces: Pieces, aligned: Sequence[Tensor], **more: Any) -> Traits:
    """aligned: all tensors that are addressed by strides."""
    from ....kernels.attention.blocks import Traits, alignment
    from ....kernels.attention.tiles import split_dim

    parts = split_dim(p.dim, p.q.element_size())
    features = {
        "DESCRIBED": False,
        "RAGGED": p.row_items is not None,
        "SILENT": False,
        "UNCLIPPED": False,
        "CLIPPED": False,
        "SIGNED": False,
        "MASS": 0,
        "PERSISTENT": False,
        "SPECIALIZED": False,
        **more,
    }
    return Traits(
        D=p.dim,
        PARTS=parts,
        FIRSTS=tuple(accumulate(parts, initial=0))[:-1],
        N_PARTS=len(parts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        TENSORS=len(p.k),
        HEADS_PER_KV=p.heads // p.kv_heads,
        ALIGN=alignment(aligned),
        GROUPED=p.n_groups > 1,
        LANES=bool(pieces.labels),
        PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        EMULATE=interpreted() and p.q.dtype == torch.bfloat16,
        **features,
    )


def piece_arguments(p: Problem, pieces: Pieces) -> dict[str, Any]:
    """key_starts, segments, labels, pieces and groups, as the launchers take them"""
    device, several = p.q.device, len(pieces.lengths) > 1
    return {
        "key_starts": starts(pieces.lengths, p.key_items, device) if several else None,
        "segments": constant(pieces.segments, torch.int32, device) if pieces.labels else None,
        "labels": constant(pieces.labels, torch.int32, device) if pieces.labels else None,
        "pieces": len(pieces.lengths),
        "groups": p.n_groups,
    }


def piece_order(p: Problem, pieces: Pieces) -> Tensor | None:
    """The pieces sorted by group, then each group's first place among them; None: one group."""
    if p.n_groups == 1:
        return None
    groups = pieces.groups
    order = sorted(range(len(groups)), key=lambda i: groups[i])
    firsts = accumulate((groups.count(g) for g in range(p.n_groups)), initial=0)
    return constant((*order, *firsts), torch.int32, p.q.device)


def piece_groups(p: Problem, pieces: Pieces) -> Tensor | None:
    """The group of each piece; None: one group."""
    return constant(pieces.groups, torch.int32, p.q.device) if p.n_groups > 1 else None


def table(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()

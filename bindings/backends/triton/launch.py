"""From a Problem to the arguments of the attention kernels: the only place that packs them.

Needs Triton: imported when a kernel is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ....kernels.attention.arguments import (
    Contrast,
    Counts,
    Inputs,
    Layout,
    Tables,
    alignment,
    key_tensors,
    row_tensor,
    table,
)
from ....kernels.attention.tiles import TileConfig, split_dim
from ....kernels.attention.traits import AttentionTraits
from ...core.problem import Problem
from ..gpu.constants import constant, starts
from ..gpu.device import interpreted

SHORT = 32  # keys; neighbouring segments below it share tiles, which would otherwise be mostly padding


class KeyRanges(NamedTuple):
    """The keys as the kernels walk them: one range for each segment, or for a run of short segments."""

    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    segments: tuple[int, ...]  # of each range, -1: several
    labels: tuple[int, ...]  # segment of each key; empty where the ranges are the segments

    @classmethod
    def of(cls, p: Problem, per_segment: bool) -> KeyRanges:
        """The ranges of a problem.

        Args:
            p: the problem.
            per_segment: the kernel returns something of each segment, so that no two may share a tile.
        """
        join = not per_segment and len(p.k) == 1 and p.key_items is None and p.valid is None
        join = join and (p.bias is not None or p.weight is not None)
        return (joined_ranges if join else segment_ranges)(p.key_lengths, p.groups)


def segment_ranges(lengths: tuple[int, ...], groups: tuple[int, ...]) -> KeyRanges:
    """One range for each segment."""
    return KeyRanges(lengths, groups, tuple(range(len(lengths))), ())


@functools.lru_cache(1024)
def joined_ranges(lengths: tuple[int, ...], groups: tuple[int, ...]) -> KeyRanges:
    """Neighbours of one group below SHORT keys as one range."""
    runs: list[list[int]] = []
    for (is_short, _), neighbours in groupby(range(len(lengths)), lambda c: (lengths[c] < SHORT, groups[c])):
        run = list(neighbours)
        runs += [run] if is_short else [[c] for c in run]
    if len(runs) == len(lengths):
        return segment_ranges(lengths, groups)
    return KeyRanges(
        tuple(sum(lengths[c] for c in run) for run in runs),
        tuple(groups[run[0]] for run in runs),
        tuple(run[0] if len(run) == 1 else -1 for run in runs),
        tuple(c for c, length in enumerate(lengths) for _ in range(length)),
    )


def pack_layout(
    p: Problem, ranges: KeyRanges, row_starts: Tensor | None, owner: Literal["rows", "keys"]
) -> Layout:
    """Row segments and key ranges.

    Args:
        p: the problem.
        ranges: its key ranges.
        row_starts: (1|B, R + 1) int32; None for one row segment.
        owner: what a program of the kernel owns.
    """
    device, groups = p.q.device, ranges.groups
    several = len(ranges.lengths) > 1
    order = by_key = None
    if p.n_groups > 1 and owner == "rows":
        sorted_ranges = sorted(range(len(groups)), key=lambda i: groups[i])
        positions = accumulate((groups.count(g) for g in range(p.n_groups)), initial=0)
        order = constant((*sorted_ranges, *positions), torch.int32, device)
    elif p.n_groups > 1:
        by_key = constant(groups, torch.int32, device)
    return Layout(
        row_starts=table(row_starts, 1),
        key_starts=table(starts(ranges.lengths, p.key_items, device), 1) if several else None,
        order=order,
        groups=by_key,
        segments=constant(ranges.segments, torch.int32, device) if ranges.labels else None,
        labels=constant(ranges.labels, torch.int32, device) if ranges.labels else None,
        valid=p.valid,
    )


def pack_inputs(
    p: Problem, layout: Layout, gain: Tensor | None, contrast: Contrast | None = None, values: bool = True
) -> Inputs:
    """The kernel's view of a problem.

    Args:
        p: the problem.
        layout: from pack_layout.
        gain: (1|B, 1|H, R) float32, in place of p.gain.
        contrast: of the forward pass.
        values: False for a kernel that reads no values.
    """
    return Inputs(
        q=row_tensor(p.q, p.source_q),
        k=key_tensors(p.k, p.source_k),
        v=key_tensors(p.v, p.source_v) if values else None,
        tables=Tables(**{name: table(getattr(p, name)) for name in Tables._fields} | {"gain": table(gain)}),
        layout=layout,
        contrast=contrast,
        scale=p.scale,
    )


def count(p: Problem, ranges: KeyRanges, n_blocks: int) -> Counts:
    """The sizes of a launch with n_blocks blocks of rows or of keys for each item and head."""
    return Counts(
        n_items=p.batch,
        n_heads=p.heads,
        n_rows=p.rows,
        n_keys=p.keys,
        n_blocks=n_blocks,
        n_row_segments=len(p.row_lengths),
        n_key_segments=len(p.key_lengths),
        n_ranges=len(ranges.lengths),
        n_groups=p.n_groups,
    )


def make_traits(
    p: Problem, tile: TileConfig, ranges: KeyRanges, strided: Sequence[Tensor], **features: Any
) -> AttentionTraits:
    """The compile-time constants of a kernel.

    Args:
        p: the problem.
        tile: sizes of the kernel's tiles.
        ranges: the problem's key ranges.
        strided: all tensors that the kernel addresses by strides.
        features: fields of AttentionTraits in place of those that are off here.
    """
    widths = split_dim(p.dim, p.q.element_size())
    return AttentionTraits(
        D=p.dim,
        PART_WIDTHS=widths,
        PART_STARTS=tuple(accumulate(widths, initial=0))[:-1],
        N_PARTS=len(widths),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        KEY_TENSORS=len(p.k),
        HEADS_PER_KV=p.heads // p.kv_heads,
        ALIGN=alignment(strided),
        GROUPED=p.n_groups > 1,
        MIXED=bool(ranges.labels),
        PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        EMULATE_BF16=interpreted() and p.q.dtype == torch.bfloat16,
        **{
            "DESCRIPTORS": False,
            "RAGGED": p.row_items is not None,
            "SKIP_PV": False,
            "LINEAR_CONTRAST": False,
            "CLIPPED_CONTRAST": False,
            "NEGATIVE_SCALE": False,
            "MASS_WIDTH": 0,
            **features,
        },
    )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()

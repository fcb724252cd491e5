"""The light kernels around an attention's forward pass, for the backends whose main kernel leaves partial
sums behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.problem import Problem
from . import launch, measured_tiles as tiles

if TYPE_CHECKING:
    from ....kernels.attention.blocks import Traits

SCALED_ROWS = 64  # of a program


def plain_traits(p: Problem, out: Tensor) -> Traits:
    """For a main kernel that is not Triton's: one piece a segment, none of the attention's own features."""
    tile = tiles.forward_tile(p.q.device, p.dim, p.q.element_size(), False, 0)
    return launch.make_traits(p, tile, launch.Pieces.of(p, per_segment=True), [p.q, *p.k, *p.v, out])


def value_sums(p: Problem, traits: Traits, key_starts: Tensor | None) -> Tensor:
    """(B, Hkv, C, D) float32"""
    from ....kernels.attention import statistics as kernels

    C = len(p.key_lengths)
    return kernels.value_sums(
        p.v, p.batch, C, traits, key_starts=key_starts, valid=p.valid, source_v=p.source_v
    )


def mass_and_gain(
    p: Problem, out: Tensor, partial: Tensor, row_starts: Tensor, traits: Traits, block_m: int, parts: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Masses (B, H, R, C), and gains (B, H, R) where they are derived or wanted; a derived gain scales `out`
    in place.

    partial: (B, H, row blocks * parts, C) float32, of blocks of block_m rows.
    """
    from ....kernels.attention import statistics as kernels

    device, R, C = p.q.device, len(p.row_lengths), len(p.key_lengths)
    mass = kernels.sum_mass(partial, row_starts, R, block_m, parts)
    gain = None
    if (rule := p.head_gain) is not None:
        flags = (*_flags(rule.rows, R), *_flags(rule.apply, R), *_flags(rule.keys, C))
        gain = kernels.head_gain(
            mass,
            launch.constant(flags, torch.int32, device),
            row_starts,
            rule.norm,
            rule.span,
            rule.floor,
            launch.table(p.gain),
        )
        blocks = launch.blocks(p.row_lengths, p.row_items, SCALED_ROWS)
        kernels.scale_rows(out, gain, row_starts, traits, SCALED_ROWS, blocks)
    elif p.need_stats:
        gain = torch.ones(p.batch, p.heads, R, dtype=torch.float32, device=device)
        if p.gain is not None:
            gain *= p.gain
    return mass, gain


def _flags(indices: tuple[int, ...], count: int) -> list[int]:
    return [int(i in indices) for i in range(count)]

"""The kernels around an attention kernel: sums of values before it, mass and head gain after it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.problem import Problem
from .constants import blocks, constant
from .device import interpreted

GAIN_BLOCK_M = 64  # rows that one program of scale_rows multiplies by the gain


def value_sums(p: Problem, block_n: int, key_starts: Tensor | None) -> Tensor:
    """Sum of the valid values of each key segment.

    Args:
        p: the problem.
        block_n: keys of a tile; it fixes the order of the sum.
        key_starts: (1|B, C + 1) int32; None for one key segment.

    Returns:
        (B, Hkv, C, D) float32.
    """
    from ....kernels.attention import statistics as kernels
    from ....kernels.attention.arguments import key_tensors

    values = key_tensors(p.v, p.source_v)
    return kernels.value_sums(values, p.batch, len(p.key_lengths), block_n, key_starts, p.valid)


def mass_and_gain(
    p: Problem, out: Tensor, partial: Tensor, row_starts: Tensor, block_m: int, parts: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Sum the partial masses, and multiply `out` in place by the head gain if the problem derives one.

    Args:
        p: the problem.
        out: (B, M, H, D), the result of the attention kernel without a derived gain.
        partial: (B, H, row blocks * parts, C) float32, mass of the row blocks.
        row_starts: (1|B, R + 1) int32.
        block_m: rows of a row block.
        parts: partial masses of one row block.

    Returns:
        mass (B, H, R, C) float32, and gain (B, H, R) float32; the gain is None if it is neither derived nor
        returned to the caller.
    """
    from ....kernels.attention import statistics as kernels

    device, R, C = p.q.device, len(p.row_lengths), len(p.key_lengths)
    mass = kernels.sum_mass(partial, row_starts, R, block_m, parts)
    gain = None
    if (rule := p.head_gain) is not None:
        assert p.head_gain_values is not None
        span, floor = p.head_gain_values
        flags = (*_flags(rule.rows, R), *_flags(rule.apply, R), *_flags(rule.keys, C))
        gain = kernels.head_gain(
            mass,
            constant(flags, torch.int32, device),
            row_starts,
            rule.norm,
            span,
            floor,
            None if p.gain is None else p.gain.contiguous(),
        )
        kernels.scale_rows(
            out,
            gain,
            row_starts,
            GAIN_BLOCK_M,
            blocks(p.row_lengths, p.row_items, GAIN_BLOCK_M),
            emulate_bf16=interpreted() and out.dtype == torch.bfloat16,
        )
    elif p.need_stats:
        gain = torch.ones(p.batch, p.heads, R, dtype=torch.float32, device=device)
        if p.gain is not None:
            gain *= p.gain
    return mass, gain


def _flags(indices: tuple[int, ...], count: int) -> list[int]:
    """1 at the indices, 0 elsewhere."""
    return [int(i in indices) for i in range(count)]

"""column_mass in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.problem import Problem
from ..gpu.constants import blocks, constant, starts
from ..gpu.device import arch, on_device
from . import launch


def column_mass(problem: Problem, lse: Tensor, counted: tuple[int, ...]) -> Tensor:
    """lse (B, H, M, G), counted: indices of the row segments -> (B, H, N) float32; deterministic, no map in
    memory.
    """
    with on_device(problem.q):
        return _column_mass(problem, lse, counted)


def _column_mass(p: Problem, lse: Tensor, counted: tuple[int, ...]) -> Tensor:
    from ....kernels.attention.column_mass import column_mass
    from ....kernels.attention.tiles import column_tile

    device = p.q.device
    pieces = launch.Pieces.of(p, per_segment=False)
    tile = column_tile(arch(device), p.dim, p.q.element_size())
    traits = launch.make_traits(p, tile, pieces, [p.q, *p.k], RAGGED=p.key_items is not None)
    mass = torch.empty(p.batch, p.heads, p.keys, dtype=torch.float32, device=device)
    flags = tuple(int(r in counted) for r in range(len(p.row_lengths)))
    column_mass(
        p.q,
        p.k,
        lse.to(torch.float32).contiguous(),
        mass,
        constant(flags, torch.int32, device),
        traits,
        warps=tile.warps,
        stages=tile.stages,
        key_blocks=blocks(pieces.lengths, p.key_items, tile.block_n),
        row_starts=starts(p.row_lengths, p.row_items, device),
        key_segments=len(p.key_lengths),
        scale=p.scale,
        scales=launch.table(p.scales),
        bias=launch.table(p.bias),
        valid=p.valid,
        source_q=p.source_q,
        source_k=p.source_k,
        piece_groups=launch.piece_groups(p, pieces),
        **launch.piece_arguments(p, pieces),
    )
    return mass

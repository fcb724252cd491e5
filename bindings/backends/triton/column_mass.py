"""column_mass in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.problem import Problem
from ..gpu.constants import blocks, constant, starts
from ..gpu.device import arch, on_device


def column_mass(problem: Problem, lse: Tensor, counted: tuple[int, ...]) -> Tensor:
    """Column mass of the attention map; deterministic, without the map in memory.

    Args:
        problem: q, k and the control.
        lse: (B, H, M, G).
        counted: indices of the row segments whose rows are summed.

    Returns:
        (B, H, N) float32.
    """
    with on_device(problem.q):
        return _column_mass(problem, lse, counted)


def _column_mass(p: Problem, lse: Tensor, counted: tuple[int, ...]) -> Tensor:
    from ....kernels.attention.column_mass import column_mass
    from ....kernels.attention.tiles import column_tile
    from . import launch

    device = p.q.device
    ranges = launch.KeyRanges.of(p, per_segment=False)
    tile = column_tile(arch(device), p.dim, p.q.element_size())
    traits = launch.make_traits(p, tile, ranges, [p.q, *p.k], RAGGED=p.key_items is not None)
    row_starts = starts(p.row_lengths, p.row_items, device)
    layout = launch.pack_layout(p, ranges, row_starts, "keys")
    mass = torch.empty(p.batch, p.heads, p.keys, dtype=torch.float32, device=device)
    flags = tuple(int(r in counted) for r in range(len(p.row_lengths)))
    column_mass(
        launch.pack_inputs(p, layout, None, values=False),
        mass,
        lse.to(torch.float32).contiguous(),
        constant(flags, torch.int32, device),
        launch.count(p, ranges, blocks(ranges.lengths, p.key_items, tile.block_n)),
        traits,
        tile,
    )
    return mass

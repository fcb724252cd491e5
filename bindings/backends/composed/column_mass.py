"""column_mass from the map, recomputed a block of rows at a time, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.problem import Problem
from ...core.recomputed_map import blocks, compute_dtype
from ...core.semantics import gather


def column_mass(p: Problem, lse: Tensor, counted: tuple[int, ...]) -> Tensor:
    """lse (B, H, M, G); counted: the row segments that count -> (B, H, N) float32, float64 for float64."""
    dtype, device = compute_dtype(p), p.q.device
    mass = torch.zeros(p.batch, p.heads, p.keys, dtype=dtype, device=device)
    chosen = torch.tensor(counted, dtype=torch.int64, device=device)
    queries, keys, _ = gather(p, dtype)
    for block in blocks(p, queries, keys, lse):
        mass += torch.where(torch.isin(block.label, chosen)[:, None, :, None], block.prob, 0).sum(2)
    return mass

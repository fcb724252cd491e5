"""Random arguments of qk_norm_rope()."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def tables(tokens: int, dim: int, rope: str, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, dim) of random angles, the same in both halves of a pair."""
    angles = torch.randn(tokens, dim // 2, dtype=torch.float64) * 3
    both = angles.repeat_interleave(2, 1) if rope == "interleaved" else torch.cat((angles, angles), 1)
    return both.cos().to(dtype), both.sin().to(dtype)


def streams(*sizes: int, dtype=torch.float64, batch=2, heads=3, dim=8):
    result = []
    for i, n in enumerate(sizes):
        x = torch.randn(batch, n, heads, dim, dtype=dtype)
        weight = torch.rand(dim, dtype=dtype) + 0.5 if i != 2 else None
        offset = torch.randn(n, heads, dim, dtype=dtype) if i % 2 else None
        result.append((x, weight, offset))
    return result

"""NormRope: one call of qk_norm_rope, checked. Every backend takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NormRope(NamedTuple):
    """The inputs of qk_norm_rope, in the order of the registered operator's schema."""

    xs: Sequence[Tensor]  # one (batch, tokens, heads, dim) for each stream
    weights: Sequence[Tensor | None]  # (dim,), or None: no norm
    offsets: Sequence[Tensor | None]  # broadcastable to its stream, or None
    cos: Tensor | None  # (all tokens, dim)
    sin: Tensor | None
    eps: float
    half: bool  # rotate halves, not neighbours
    permutation: Tensor | None  # (all tokens,) or (batch, all tokens)


SCHEMA = (
    "Tensor[] x, Tensor?[] weight, Tensor?[] offset, Tensor? cos, Tensor? sin, float eps, bool half, "
    "Tensor? permutation"
)


def sum_to(t: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a broadcast tensor t, from that of its broadcast form."""
    wide = grad.to(torch.promote_types(grad.dtype, t.dtype))
    return wide.sum_to_size(t.shape).to(t.dtype).clone(memory_format=torch.contiguous_format)

"""column_mass(): how much attention each key receives, without the attention map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Keys, Source, _lower
from .backends.composed_backward import blocks, compute_dtype
from .backends.reference import gather
from .control import Control, _indices
from .problem import Problem


@torch.no_grad()
def column_mass(
    q: Tensor,
    k: Keys,
    lse: Tensor,
    control: Control | None = None,
    *,
    scale: float | Tensor | None = None,
    source: Source | None = None,
    rows: str | Sequence[str] = "*",
) -> Tensor:
    """sum_i p_ij for each key j, over the rows i of some row segments: self-attention guidance's column mass.

    p is the probability within the key's softmax group, before weight, gate, contrast and gain, as in `Stats.mass`;
    here it is resolved by key. The map is recomputed from lse, a block of rows at a time.

    Args:
        q, k, control, scale, source: as in attention().
        lse: `Stats.lse` of that attention, (batch, heads, rows, groups).
        rows: the row segments that count, a name or a sequence of names of control.rows; "*": all rows.

    Returns:
        (batch, heads, keys) float32 (float64 for float64), the keys in the order of k (of the joined list). A removed
        key gives 0. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    p = lower_with_lse(q, k, lse, control, scale, source)
    counted = None
    if rows != "*":
        if control is None:
            raise ValueError(f"rows: expected '*' in a call without a control, got {rows!r}")
        counted = torch.tensor(_indices("rows", rows, control.rows), dtype=torch.int64, device=q.device)
    dtype = compute_dtype(p)
    mass = torch.zeros(p.batch, p.heads, p.keys, dtype=dtype, device=q.device)
    if p.batch * p.rows * p.heads == 0 or p.keys == 0:
        return mass
    queries, keys, _ = gather(p, dtype)
    for block in blocks(p, queries, keys, lse):
        prob = block.prob
        if counted is not None:
            prob = torch.where(torch.isin(block.label, counted)[:, None, :, None], prob, 0)
        mass += prob.sum(2)
    return mass


def lower_with_lse(
    q: Tensor, k: Keys, lse: Tensor, control: Control | None, scale: float | Tensor | None, source: Source | None
) -> Problem:
    """The checked problem of a call without values, whose place the keys take."""
    if source is not None and isinstance(source, dict) and "v" in source:
        raise ValueError("source: expected the keys q and k, got v")
    p = _lower(q, k, k, control, scale, None if source is None else {**source, "v": source.get("k")}, None, None)  # type: ignore[dict-item]
    expected = (p.batch, p.heads, p.rows, p.n_groups)
    if not isinstance(lse, Tensor) or not lse.is_floating_point():
        got = lse.dtype if isinstance(lse, Tensor) else type(lse).__name__
        raise TypeError(f"lse: expected a float tensor {expected}, got {got}")
    if lse.requires_grad:
        raise TypeError("lse: a tensor that requires grad is not differentiated; its part is in the result's own gradient")
    if tuple(lse.shape) != expected:
        raise ValueError(f"lse: expected shape {expected} (batch, heads, rows, groups), got {tuple(lse.shape)}")
    if lse.device != q.device:
        raise ValueError(f"lse: expected q's device {q.device}, got {lse.device}")
    return p

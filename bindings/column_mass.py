"""column_mass(): how much attention each key receives, without the attention map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Keys, Source, _lower
from .backends.composed.backward import blocks, compute_dtype
from .backends.cpu import column_mass as cpu_column_mass
from .backends.reference import gather
from .backends.triton import column_mass as triton_column_mass
from .core.autograd import refuse_tangents
from .core.control import Control, _indices
from .core.problem import Problem


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

    p is the probability within the key's softmax group, before weight, gate, contrast and gain, as in
    `Stats.mass`; here it is resolved by key. The map is recomputed from lse, in tiles.

    Args:
        q, k, control, scale, source: as in attention().
        lse: `Stats.lse` of that attention, (batch, heads, rows, groups).
        rows: the row segments that count, a name or a sequence of names of control.rows; "*": all rows.

    Returns:
        (batch, heads, keys) float32 (float64 for float64), the keys in the order of k (of the joined list). A
        removed key gives 0. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    p = lower_with_lse(q, k, lse, control, scale, source)
    refuse_tangents(p.q, *p.k, lse)
    if rows == "*":
        counted = tuple(range(len(p.row_lengths)))
    elif control is None:
        raise ValueError(f"rows: expected '*' in a call without a control, got {rows!r}")
    else:
        counted = _indices("rows", rows, control.rows)
    return torch.ops.flashbrush.column_mass.default(
        p.q,
        list(p.k),
        lse,
        list(p.row_lengths),
        list(p.key_lengths),
        list(p.groups),
        list(p.kinds),
        p.scale,
        p.scales,
        p.row_items,
        p.key_items,
        p.valid,
        p.bias,
        p.source_q,
        p.source_k,
        list(counted),
    )


def _composed(p: Problem, lse: Tensor, counted: tuple[int, ...]) -> Tensor:
    dtype, device = compute_dtype(p), p.q.device
    mass = torch.zeros(p.batch, p.heads, p.keys, dtype=dtype, device=device)
    chosen = torch.tensor(counted, dtype=torch.int64, device=device)
    queries, keys, _ = gather(p, dtype)
    for block in blocks(p, queries, keys, lse):
        mass += torch.where(torch.isin(block.label, chosen)[:, None, :, None], block.prob, 0).sum(2)
    return mass


def _run(
    q,
    k,
    lse,
    row_lengths,
    key_lengths,
    groups,
    kinds,
    scale,
    scales,
    row_items,
    key_items,
    valid,
    bias,
    source_q,
    source_k,
    counted,
) -> Tensor:
    p = Problem(
        q=q,
        k=tuple(k),
        v=tuple(k),
        batch=lse.shape[0],
        row_lengths=tuple(row_lengths),
        key_lengths=tuple(key_lengths),
        groups=tuple(groups),
        kinds=tuple(kinds),
        contrast=(None,) * lse.shape[3],
        scale=scale,
        scales=scales,
        row_items=row_items,
        key_items=key_items,
        valid=valid,
        bias=bias,
        source_q=source_q,
        source_k=source_k,
        source_v=source_k,
    )
    if p.batch * p.rows * p.keys == 0:
        return torch.zeros(p.batch, p.heads, p.keys, dtype=compute_dtype(p), device=q.device)
    fused = next((m for m in (cpu_column_mass, triton_column_mass) if m.usable(p)), None)
    return (_composed if fused is None else fused.column_mass)(p, lse, tuple(counted))


def _fake(q, k, lse, *rest) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(lse.shape[0], q.shape[2], sum(t.shape[1] for t in k), dtype=dtype)


_library = torch.library.Library("flashbrush", "FRAGMENT")
_library.define(
    "column_mass(Tensor q, Tensor[] k, Tensor lse, SymInt[] row_lengths, SymInt[] key_lengths, int[] groups, "
    "int[] kinds, float scale, Tensor? scales, Tensor? row_items, Tensor? key_items, Tensor? valid, Tensor? bias, "
    "Tensor? source_q, Tensor? source_k, int[] counted) -> Tensor"
)
_library.impl("column_mass", _run, "CompositeExplicitAutograd")
torch.library.register_fake("flashbrush::column_mass", _fake, lib=_library)


def lower_with_lse(
    q: Tensor,
    k: Keys,
    lse: Tensor,
    control: Control | None,
    scale: float | Tensor | None,
    source: Source | None,
) -> Problem:
    """The checked problem of a call without values, whose place the keys take."""
    if source is not None and isinstance(source, dict) and "v" in source:
        raise ValueError("source: expected the keys q and k, got v")
    p = _lower(
        q, k, k, control, scale, None if source is None else {**source, "v": source.get("k")}, None, None
    )  # type: ignore[dict-item]
    expected = (p.batch, p.heads, p.rows, p.n_groups)
    if not isinstance(lse, Tensor) or not lse.is_floating_point():
        got = lse.dtype if isinstance(lse, Tensor) else type(lse).__name__
        raise TypeError(f"lse: expected a float tensor {expected}, got {got}")
    if lse.requires_grad:
        raise TypeError(
            "lse: a tensor that requires grad is not differentiated; its part is in the result's own gradient"
        )
    if tuple(lse.shape) != expected:
        raise ValueError(
            f"lse: expected shape {expected} (batch, heads, rows, groups), got {tuple(lse.shape)}"
        )
    if lse.device != q.device:
        raise ValueError(f"lse: expected q's device {q.device}, got {lse.device}")
    return p

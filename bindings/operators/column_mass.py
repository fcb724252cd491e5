"""The registered column_mass: attention received by each key. Its inputs are those fields of Problem that
decide p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.planner import resolve
from ..core.problem import MAP, Problem, pack, schema, unpack
from ..core.recomputed_map import compute_dtype
from .library import register

_REST = tuple(name for name in MAP if name not in ("q", "k"))


def call(p: Problem, lse: Tensor, counted: tuple[int, ...], backend: str) -> Tensor:
    """The operator on a problem; lse (batch, heads, rows, groups), counted: indices of row segments."""
    return column_mass(p.q, list(p.k), lse, *pack(p, _REST), list(counted), backend=backend)


def _run(q, k, lse, *inputs, backend: str = "auto") -> Tensor:
    *rest, counted = inputs
    k = tuple(k)
    p = unpack((q, k, *rest), ("q", "k", *_REST), v=k, contrast=(None,) * lse.shape[3])
    p = p.changed(source_v=p.source_k, batch=lse.shape[0])
    if p.batch * p.rows * p.keys == 0:
        return torch.zeros(p.batch, p.heads, p.keys, dtype=compute_dtype(p), device=q.device)
    return resolve("column_mass", backend, q.device, p)(p, lse, tuple(counted))


def _fake(q, k, lse, *_, **__) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(lse.shape[0], q.shape[2], sum(t.shape[1] for t in k), dtype=dtype)


column_mass = register(
    f'column_mass({schema(("q", "k"))}, Tensor lse, {schema(_REST)}, int[] counted, *, str backend="auto") '
    "-> Tensor",
    _run,
    _fake,
)

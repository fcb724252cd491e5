"""The registered attention operators: forward, forward into a given output, and gradient.

Their inputs are the fields of Problem, in the order of its declaration (core/problem.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.interface import Result
from ..backends.planner import resolve, resolve_backward
from ..core.coalesce import coalesce
from ..core.problem import Problem, position, schema, unpack
from ..core.semantics import total_gain
from .library import register


def solve(problem: Problem, backend: str) -> Result:
    """Run a problem on a backend, or on the planner's choice.

    Calls without a row or a key are answered here, so that no backend meets an empty launch.
    """
    p = problem
    if p.batch * p.rows * p.heads == 0 or p.keys == 0:
        return _empty(p)
    p = coalesce(p)
    result = resolve("attention", backend, p.q.device, p)(p)
    if p.out is not None and result.out is not p.out:
        p.out.copy_(result.out)
    return result


def stats(problem: Problem, result: Result) -> tuple[Tensor, Tensor, Tensor]:
    """lse, mass and gain, contiguous; empty tensors where they are not needed."""
    if not problem.need_stats:
        return tuple(_empty_stats(problem.q, 0, 0, 0, 0, 0, need_stats=False))  # type: ignore[return-value]
    assert result.lse is not None and result.mass is not None and result.gain is not None
    # An operator's output may not share memory with an input, as a backend's gain does with the given table.
    gain = result.gain if problem.gain is None else result.gain.clone(memory_format=torch.contiguous_format)
    return result.lse.contiguous(), result.mass.contiguous(), gain.contiguous()


def _empty(p: Problem) -> Result:
    """Output 0, lse -inf, mass 0, and the gain of that mass."""
    out = p.q.new_zeros(p.batch, p.rows, p.heads, p.dim) if p.out is None else p.out.zero_()
    sizes = (p.batch, p.rows, len(p.row_lengths), len(p.key_lengths), p.n_groups)
    lse, mass, gain = _empty_stats(p.q, *sizes, need_stats=p.need_stats)
    lse.fill_(-torch.inf)
    mass.zero_()
    if p.need_stats:
        gain.copy_(total_gain(p, mass))
    return Result(out, lse, mass, gain)


def _empty_stats(
    q: Tensor, batch: Any, rows: Any, row_segments: int, key_segments: int, groups: int, *, need_stats: bool
) -> list[Tensor]:
    """lse, mass and gain without their values"""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not need_stats:
        return [q.new_empty(0, dtype=dtype) for _ in range(3)]
    heads = q.shape[2]
    return [
        q.new_empty(batch, heads, rows, groups, dtype=dtype),
        q.new_empty(batch, heads, row_segments, key_segments, dtype=dtype),
        q.new_empty(batch, heads, row_segments, dtype=dtype),
    ]


def _run(*inputs):
    *packed, need_stats, backend = inputs
    problem = unpack(packed, need_stats=need_stats)
    result = solve(problem, backend)
    return (result.out.contiguous(), *stats(problem, result))


def _run_out(*inputs):
    *packed, need_stats, backend, out = inputs
    problem = unpack(packed, need_stats=need_stats, out=out)
    return stats(problem, solve(problem, backend))


def _run_backward(dout, out, lse, total_gain, *inputs):
    *packed, backend = inputs
    # The total gain stands in for the rule that it was derived by: rows keep their segments, and short key
    # segments may be joined.
    problem = coalesce(unpack(packed).changed(gain=total_gain, head_gain=None, head_gain_values=None))
    return resolve_backward(backend, problem)(problem, dout, out, lse, total_gain)


_Q, _SOURCE_Q, _ROW_LENGTHS, _KEY_LENGTHS, _CONTRAST = map(
    position, ("q", "source_q", "row_lengths", "key_lengths", "contrast")
)


def _fake_stats(packed, need_stats: bool) -> list[Tensor]:
    q, source_q = packed[_Q], packed[_SOURCE_Q]
    batch = (q if source_q is None else source_q).shape[0]
    sizes = (len(packed[i]) for i in (_ROW_LENGTHS, _KEY_LENGTHS, _CONTRAST))
    return _empty_stats(q, batch, q.shape[1], *sizes, need_stats=need_stats)


def _fake(*inputs):
    *packed, need_stats, _ = inputs
    q, source_q = packed[_Q], packed[_SOURCE_Q]
    batch = (q if source_q is None else source_q).shape[0]
    return (q.new_empty(batch, *q.shape[1:]), *_fake_stats(packed, need_stats))


def _fake_out(*inputs):
    *packed, need_stats, _, _ = inputs
    return tuple(_fake_stats(packed, need_stats))


def _fake_backward(dout, out, lse, total_gain, q, k, v, *_):
    return q.new_empty(q.shape), [t.new_empty(t.shape) for t in k], [t.new_empty(t.shape) for t in v]


_STATS = "Tensor lse, Tensor mass, Tensor head_gains"
attention = register(
    f"attention({schema()}, bool need_stats, str backend) -> (Tensor out, {_STATS})", _run, _fake
)
attention_out = register(
    f"attention_out({schema()}, bool need_stats, str backend, Tensor(a!) out) -> ({_STATS})",
    _run_out,
    _fake_out,
)
attention_backward = register(
    f"attention_backward(Tensor dout, Tensor out, Tensor lse, Tensor head_gains, {schema()}, str backend) "
    "-> (Tensor dq, Tensor[] dk, Tensor[] dv)",
    _run_backward,
    _fake_backward,
)

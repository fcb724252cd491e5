"""torch.ops.flashbrush.*: schemas, implementations and fakes of the attention operators; one boundary per
call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends import Result
from ..backends.planner import resolve, resolve_backward
from ..backends.reference import total_gain
from ..core.coalesce import coalesce
from ..core.control import NORMS, Contrast
from ..core.problem import GainRule, Problem

_INPUTS = (
    "Tensor q, Tensor[] k, Tensor[] v, SymInt[] row_lengths, SymInt[] key_lengths, int[] groups, int[] kinds, "
    "int[] contrast, Tensor? contrast_values, float scale, Tensor? scales, Tensor? row_items, Tensor? key_items, "
    "Tensor? valid, Tensor? bias, Tensor? weight, Tensor? gain, Tensor? gates, int[] head_gain, "
    "Tensor? head_gain_values, "
    "Tensor? source_q, Tensor? source_k, Tensor? source_v, Tensor? mask"
)
_SOURCE_Q = 20  # place of source_q in _INPUTS
_library = torch.library.Library("flashbrush", "DEF")
_library.define(
    f"attention({_INPUTS}, bool need_stats, str backend) -> (Tensor out, Tensor lse, Tensor mass, Tensor head_gains)"
)
_library.define(
    f"attention_out({_INPUTS}, bool need_stats, str backend, Tensor(a!) out) "
    "-> (Tensor lse, Tensor mass, Tensor head_gains)"
)
_library.define(
    f"attention_backward(Tensor dout, Tensor out, Tensor lse, Tensor head_gains, {_INPUTS}, str backend) "
    "-> (Tensor dq, Tensor[] dk, Tensor[] dv)"
)


def pack_contrast(contrast: tuple[Contrast | None, ...]) -> list[int]:
    """0 none, 1 unclipped, 2 clipped. The numbers travel as a tensor, so that a changed one does not
    recompile.
    """
    return [0 if c is None else 1 if c.clip is None else 2 for c in contrast]


def _unpack_contrast(kinds: list[int], values: Tensor | None) -> tuple[Contrast | None, ...]:
    """values: (groups, 3) beta, lo, hi, on the CPU, where reading them is no device sync."""
    if values is None:
        return (None,) * len(kinds)
    rows = zip(kinds, values.tolist(), strict=True)
    return tuple(
        None if k == 0 else Contrast(beta, (lo, hi) if k == 2 else None) for k, (beta, lo, hi) in rows
    )


def pack_gain(rule: GainRule | None) -> list[int]:
    if rule is None:
        return []
    parts = (rule.rows, rule.keys, rule.apply)
    return [NORMS.index(rule.norm), *map(len, parts), *(i for part in parts for i in part)]


def _unpack_gain(flat: list[int], values: Any) -> GainRule | None:
    if not flat:
        return None
    norm, n_rows, n_keys = flat[:3]
    rest = flat[4:]
    rows, keys, apply = rest[:n_rows], rest[n_rows : n_rows + n_keys], rest[n_rows + n_keys :]
    return GainRule(tuple(rows), tuple(keys), tuple(apply), values=values, norm=NORMS[norm])


def _problem(
    q,
    k,
    v,
    row_lengths,
    key_lengths,
    groups,
    kinds,
    contrast,
    contrast_values,
    scale,
    scales,
    row_items,
    key_items,
    valid,
    bias,
    weight,
    gain,
    gates,
    head_gain,
    head_gain_values,
    source_q,
    source_k,
    source_v,
    mask,
    need_stats=False,
    out=None,
) -> Problem:
    return Problem(
        q=q,
        k=tuple(k),
        v=tuple(v),
        batch=_batch(q, source_q),
        row_lengths=tuple(row_lengths),
        key_lengths=tuple(key_lengths),
        groups=tuple(groups),
        kinds=tuple(kinds),
        contrast=_unpack_contrast(contrast, contrast_values),
        scale=scale,
        scales=scales,
        row_items=row_items,
        key_items=key_items,
        valid=valid,
        bias=bias,
        weight=weight,
        gain=gain,
        gates=gates,
        head_gain=_unpack_gain(head_gain, head_gain_values),
        source_q=source_q,
        source_k=source_k,
        source_v=source_v,
        mask=mask,
        need_stats=need_stats,
        out=out,
    )


def _batch(q: Tensor, source_q: Tensor | None) -> Any:
    return q.shape[0] if source_q is None else source_q.shape[0]


def solve(problem: Problem, backend: str) -> Result:
    """Run a problem. Calls without a row or a key are answered here, so that no backend meets an empty
    launch.
    """
    p = problem
    if p.batch * p.rows * p.heads == 0 or p.keys == 0:
        return _empty(p)
    p = coalesce(p)
    result = resolve(p, backend).forward(p)
    if p.out is not None and result.out is not p.out:
        p.out.copy_(result.out)
    return result


def _empty(p: Problem) -> Result:
    out = p.q.new_zeros(p.batch, p.rows, p.heads, p.dim) if p.out is None else p.out.zero_()
    lse, mass, gain = _stats_like(
        p.q, p.batch, p.rows, len(p.row_lengths), len(p.key_lengths), p.n_groups, p.need_stats
    )
    lse.fill_(-torch.inf)
    mass.zero_()
    if p.need_stats:
        gain.fill_(1.0)
        if p.gain is not None:
            gain.mul_(p.gain)
        if p.head_gain is not None:
            gain.copy_(total_gain(p, mass))
    return Result(out, lse, mass, gain)


def _stats_like(q: Tensor, batch, rows, row_segments, key_segments, groups, need_stats: bool) -> list[Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not need_stats:
        return [q.new_empty(0, dtype=dtype) for _ in range(3)]
    heads = q.shape[2]
    return [
        q.new_empty(batch, heads, rows, groups, dtype=dtype),
        q.new_empty(batch, heads, row_segments, key_segments, dtype=dtype),
        q.new_empty(batch, heads, row_segments, dtype=dtype),
    ]


def stats(problem: Problem, result: Result) -> tuple[Tensor, Tensor, Tensor]:
    """lse, mass and gain, contiguous; empty ones where they are not needed."""
    if not problem.need_stats:
        return tuple(_stats_like(problem.q, 0, 0, 0, 0, 0, False))  # type: ignore[return-value]
    assert result.lse is not None and result.mass is not None and result.gain is not None
    # An operator's output may not share memory with an input, as a backend's gain does with the table it was
    # given.
    gain = result.gain if problem.gain is None else result.gain.clone(memory_format=torch.contiguous_format)
    return result.lse.contiguous(), result.mass.contiguous(), gain.contiguous()


def _attention(*inputs):
    *arguments, need_stats, backend = inputs
    problem = _problem(*arguments, need_stats=need_stats)
    result = solve(problem, backend)
    # Every backend answers in the layout that the fake promises to a compiler.
    return (result.out.contiguous(), *stats(problem, result))


def _attention_out(*inputs):
    *arguments, need_stats, backend, out = inputs
    problem = _problem(*arguments, need_stats=need_stats, out=out)
    return stats(problem, solve(problem, backend))


def _attention_backward(dout, out, lse, head_gains, *inputs):
    *arguments, backend = inputs
    # The total gain stands in for its rule: short segments may then be joined, and rows keep their segments.
    problem = coalesce(replace(_problem(*arguments), gain=head_gains, head_gain=None))
    return resolve_backward(problem, backend).backward(problem, dout, out, lse, head_gains)


def _fake_stats(arguments, need_stats: bool):
    q, row_lengths, key_lengths, contrast, source_q = (arguments[i] for i in (0, 3, 4, 7, _SOURCE_Q))
    return _stats_like(
        q, _batch(q, source_q), q.shape[1], len(row_lengths), len(key_lengths), len(contrast), need_stats
    )


def _fake_attention(*inputs):
    *arguments, need_stats, _ = inputs
    q, source_q = arguments[0], arguments[_SOURCE_Q]
    return (q.new_empty(_batch(q, source_q), *q.shape[1:]), *_fake_stats(arguments, need_stats))


def _fake_attention_out(*inputs):
    *arguments, need_stats, _, _ = inputs
    return tuple(_fake_stats(arguments, need_stats))


def _fake_attention_backward(dout, out, lse, head_gains, q, k, v, *rest):
    return q.new_empty(q.shape), [t.new_empty(t.shape) for t in k], [t.new_empty(t.shape) for t in v]


for _name, _run, _fake in (
    ("attention", _attention, _fake_attention),
    ("attention_out", _attention_out, _fake_attention_out),
    ("attention_backward", _attention_backward, _fake_attention_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashbrush::{_name}", _fake, lib=_library)

attention = torch.ops.flashbrush.attention.default
attention_out = torch.ops.flashbrush.attention_out.default
attention_backward = torch.ops.flashbrush.attention_backward.default

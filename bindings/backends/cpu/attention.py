"""Attention on the CPU, forward: one fused C++ kernel, csrc/cpu/schedule/forward.cpp."""

from __future__ import annotations

import torch

from ...core.control import NORMS
from ...core.problem import Problem
from ..interface import Result
from .library import DTYPES, run
from .structures import describe_call


def why_not(problem: Problem) -> list[str]:
    reasons = []
    if problem.q.device.type != "cpu":
        reasons.append(f"the tensors are on {problem.q.device.type}")
    if problem.q.dtype not in DTYPES:
        reasons.append(f"{problem.q.dtype} is not float32, bfloat16 or float16")
    return reasons


def forward(problem: Problem) -> Result:
    """Takes any layout with a contiguous last dimension.

    Scratch: packed K and V, and some per thread. 1 or 2 threads: two heads in flight. 3 or 4 threads: one
        head per thread.
    """
    p = problem
    R, C = len(p.row_lengths), len(p.key_lengths)
    out = torch.empty(p.batch, p.rows, p.heads, p.dim, dtype=p.q.dtype) if p.out is None else p.out
    lse = torch.empty(p.batch, p.heads, p.rows, p.n_groups, dtype=torch.float32) if p.need_stats else None
    mass = torch.empty(p.batch, p.heads, R, C, dtype=torch.float32) if p.need_mass else None
    gains = torch.empty(p.batch, p.heads, R, dtype=torch.float32) if p.need_mass else None
    keep: list = []
    call = describe_call(p, out, lse, keep)
    call.mass, call.gains = (None if t is None else t.data_ptr() for t in (mass, gains))
    if (rule := p.head_gain) is not None:
        assert p.head_gain_values is not None
        call.derived, (call.span, call.floor) = NORMS.index(rule.norm), p.head_gain_values.tolist()
        call.gain_rows, call.gain_keys = _flags(rule.rows, R), _flags(rule.keys, C)
        call.gain_apply = _flags(rule.apply, R)
    run("attention", call)
    return Result(out, lse, mass, gains)


def _flags(chosen: tuple[int, ...], count: int) -> bytes:
    return bytes(i in chosen for i in range(count))

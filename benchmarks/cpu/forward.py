"""The forward pass, plain and controlled, beside torch SDPA, the papers' eager forms and this CPU's GEMM."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..cases.contestants import CONTESTANTS, OPTIONAL, Missing, gemm
from ..cases.float64_check import ExpectedRows
from ..cases.inputs import Case, draw_case
from ..cases.shapes import Shape
from ..timing import memory
from ..timing.host_clock import time_on_host
from ..timing.rounds import ratio, spread
from ..timing.rows import Row, Settings, describe_shape, dtype_name, ratio_cells, seconds_cells

RATIOS = (
    ("sdpa", "plain"),
    ("sdpa", "controlled"),
    ("controlled", "plain"),
    ("eager", "controlled"),
    ("composed", "controlled"),
    ("flex", "plain"),
)


@torch.no_grad()
def measure(shape: Shape, dtype: torch.dtype, settings: Settings) -> Row:
    """One shape: each contestant's result is checked, all are timed in the same rounds, then peak memory.

    Raises:
        WrongResult: a contestant's result is wrong.
    """
    case = draw_case(shape, dtype, settings.seed)
    expected: dict[bool, ExpectedRows] = {}
    calls: dict[str, Callable[[], object]] = {}
    errors, missing = {}, {}
    for name, contestant in {**CONTESTANTS, **(OPTIONAL if settings.with_flex else {})}.items():
        try:
            call, out = contestant.start(case)
        except Missing as reason:
            missing[name] = str(reason)
            continue
        if contestant.controlled not in expected:
            expected[contestant.controlled] = ExpectedRows(case, contestant.controlled)
        where = f"{contestant.title} at {shape.name}, {dtype}"
        errors[name] = expected[contestant.controlled].check(where, out, contestant.slack)
        calls[name] = call
        del out
    gemm_flops: dict[str, int] = {}
    for side in settings.gemm_sides:
        calls[f"gemm_{side}"], gemm_flops[f"gemm_{side}"] = gemm(side, dtype)

    samples = time_on_host(calls, settings.repeats, seed=settings.seed)
    ratios = {f"{a}/{b}": ratio(samples, a, b) for a, b in RATIOS if a in samples and b in samples}
    for name in (n for n in ("plain", "controlled", "sdpa") if n in samples):
        for side, flops in gemm_flops.items():
            ratios[f"{name} rate/{side} rate"] = ratio(samples, side, name, factor=shape.flops / flops)
    work = {name: gemm_flops.get(name, shape.flops) for name in samples}
    return {
        "section": "forward",
        "shape": describe_shape(shape),
        "dtype": dtype_name(dtype),
        "seconds": seconds_cells(samples),
        "gflops": {name: round(work[name] / spread(s).median / 1e9, 1) for name, s in samples.items()},
        "ratios": ratio_cells(ratios),
        "errors": errors,
        "memory": _memory(case, errors, settings),
        "missing": missing,
    }


def _memory(case: Case, contestants: Iterable[str], settings: Settings) -> Row:
    """Peak and extra bytes of each contestant; empty where not asked for or not measurable."""
    if not settings.with_memory or not memory.measurable():
        return {}
    inputs = sum(t.numel() * t.element_size() for t in (case.q, case.k, case.v))
    output = case.q.numel() * case.q.element_size()
    result: Row = {"q_k_v_out": inputs + output, "output": output}
    for name in contestants:
        found = memory.peak(name, case.shape.name, case.dtype, settings.threads)
        if found is not None:
            result[name] = {"peak": found.peak, "extra": found.extra}
    return result

"""Every contestant at small shapes, one at a time: `pytest benchmarks --benchmark-only`.

For watching one contestant from commit to commit. `flashbrush bench` compares contestants, in the same
rounds.
"""

from __future__ import annotations

import pytest
import torch

from flashbrush import backends
from flashbrush.benchmarks.cases.contestants import CONTESTANTS, Missing
from flashbrush.benchmarks.cases.float64_check import ExpectedRows
from flashbrush.benchmarks.cases.inputs import draw_case
from flashbrush.benchmarks.cases.shapes import SHAPES, diptych, text_cross_attention
from flashbrush.benchmarks.cpu import backward

SMALL = (
    SHAPES["h8-1024-d64"],
    diptych("h4-1024-d128", 4, 128, 448, 128),
    text_cross_attention("cross", 2, 8, 1024, 77, 40),
)
DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("contestant", CONTESTANTS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SMALL, ids=lambda s: s.name)
@torch.no_grad()
def test_forward(benchmark, shape, dtype, contestant) -> None:
    case = draw_case(shape, dtype)
    try:
        call, out = contestant.start(case)
    except Missing as reason:
        pytest.skip(str(reason))
    ExpectedRows(case, contestant.controlled).check(contestant.title, out, contestant.slack)
    benchmark.group = f"{shape.size} {dtype}"
    benchmark(call)


@pytest.mark.parametrize("name", backward.CONTESTANTS)
def test_forward_and_backward(benchmark, name) -> None:
    case = draw_case(SMALL[0], torch.bfloat16)
    if name == "plain" and (reasons := backends()["cpu"]):
        pytest.skip("; ".join(reasons))
    backward.check(draw_case(SMALL[0].shrunk(), torch.bfloat16), list(backward.CONTESTANTS))
    benchmark.group = f"forward and backward, {SMALL[0].size} {case.dtype}"
    benchmark(backward.step(name, case))

"""The C++ backend against float64 of the reference, on every instruction set that runs here."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import given, settings

from flashbrush.bindings.backends import cpu
from support.problems import Call, calls, check, draws


def run(call: Call) -> None:
    out = torch.full_like(call.run("reference"), float("nan"))
    _, stats = call.run("cpu", return_stats=True, out=out)
    check(call, out, stats)
    check(call, call.run("cpu"))  # without statistics neighbouring segments are joined


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_drawn_calls(dtype: torch.dtype) -> None:
    # FLASHBRUSH_TEST_PERCENT=200 draws the 2,000 that the error bar asks for. Each dtype draws calls of its own:
    # hypothesis would give all parameters of one test the same.
    seed = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}[dtype]

    @hypothesis.seed(seed)
    @settings(max_examples=draws(1000), derandomize=False, database=None)
    @given(calls(dtypes=(dtype,)))
    def drawn(call: Call) -> None:
        run(call)

    drawn()


@pytest.mark.parametrize("isa", cpu.isas())
@settings(max_examples=draws(100))
@given(call=calls())
def test_instruction_sets(isa: str, call: Call) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHBRUSH_CPU_ISA", isa)
        run(call)

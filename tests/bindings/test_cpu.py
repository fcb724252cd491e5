"""The C++ backend against float64 of the reference, on every instruction set that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from flashbrush.bindings.backends import cpu
from support.problems import Call, calls, check


def run(call: Call) -> None:
    out = torch.full_like(call.run("reference"), float("nan"))
    _, stats = call.run("cpu", return_stats=True, out=out)
    check(call, out, stats)
    check(call, call.run("cpu"))  # without statistics neighbouring segments are joined


@settings(max_examples=500)
@given(calls())
def test_drawn_calls(call: Call) -> None:
    run(call)


@pytest.mark.parametrize("isa", cpu.isas())
@settings(max_examples=100)
@given(call=calls())
def test_instruction_sets(isa: str, call: Call) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHBRUSH_CPU_ISA", isa)
        run(call)

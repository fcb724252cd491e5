"""A test that takes `isa` runs on each instruction set of the C++ backend that this CPU has."""

from __future__ import annotations

import pytest

from flashbrush.bindings.backends.cpu import library as cpu


@pytest.fixture(params=cpu.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FLASHBRUSH_CPU_ISA", request.param)
    return request.param

"""The instruction sets of the C++ backend: a test that takes `isa` runs on each that is built in and runs here."""

from __future__ import annotations

import pytest

from flashbrush.bindings.backends.cpu import library as cpu


@pytest.fixture(params=cpu.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FLASHBRUSH_CPU_ISA", request.param)
    return request.param

"""Every module of the benchmarks can be imported: most are run by hand, and nothing else imports them."""

from __future__ import annotations

import importlib

import pytest

from flashbrush.integrations.evaluation.machine import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if not path.name.startswith(("test_", "conftest"))
)


@pytest.mark.parametrize("module", MODULES)
def test_can_be_imported(module: str) -> None:
    pytest.importorskip("rich")
    importlib.import_module(f"flashbrush.{module}")

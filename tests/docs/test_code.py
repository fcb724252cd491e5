"""The Python in the pages runs as it stands, the blocks of a page one after the other."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from .markdown import blocks, pages

PYTHON = {page: [b for b in blocks(page) if b.language == "python"] for page in pages()}
RUN = [page for page, found in PYTHON.items() if any(not b.not_run for b in found)]
# Blocks that are not run say why in a comment before them. There are few.
NOT_RUN = [b for found in PYTHON.values() for b in found if b.not_run]


@pytest.mark.parametrize("page", RUN)
def test_code_runs(
    page: str,
    stand_ins: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where a dataclass looks for its module
    module.__dict__.update(stand_ins)
    torch.manual_seed(0)
    for block in PYTHON[page]:
        if not block.not_run:
            code = "\n" * block.line + block.code  # so that a traceback names the page's own line
            exec(compile(code, page, "exec"), module.__dict__)
    printed = sum("print(" in block.code for block in PYTHON[page] if not block.not_run)
    assert len(capsys.readouterr().out.splitlines()) >= printed


def test_blocks_that_are_not_run_are_few() -> None:
    assert {b.page for b in NOT_RUN} <= set()


def test_the_guides_method_changes_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method of the how-to page is short, and its knob at the neutral value is the plain model."""
    page = "docs/how-to/new-method.md"
    block = next(b for b in PYTHON[page] if "FadingPrompt()" in b.code)
    assert len(block.code.splitlines()) < 50
    latents = []
    for method in ("FadingPrompt()", "FadingPrompt(first=1.0)", "None"):
        module = ModuleType("page")
        monkeypatch.setitem(sys.modules, "page", module)
        torch.manual_seed(0)
        code = block.code.partition("shares = ")[0].replace("FadingPrompt()", method)
        exec(compile(code, page, "exec"), module.__dict__)
        latents.append(module.latents)
    changed, neutral, plain = latents
    assert float((changed - plain).abs().max()) > 1e-4
    torch.testing.assert_close(neutral, plain)

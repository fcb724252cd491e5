"""The README: its figures are the committed file's, its code runs, its links lead somewhere."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashbrush.benchmarks.cpu import readme, table
from flashbrush.integrations import methods
from flashbrush.integrations.evaluation import machine

PAGE = machine.ROOT / "README.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="an installed package has no README")


def test_figures_come_from_the_committed_file(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(PAGE.read_text())
    assert not readme.update(copy, table.COMMITTED), "run: python -m flashbrush.benchmarks.cpu.table --readme"


def test_no_figures_without_a_file(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(PAGE.read_text())
    readme.update(copy, tmp_path / "nothing.json")
    assert f"{readme.BEGIN}\n{readme.END}" in copy.read_text()


def test_figures_of_a_run(tmp_path: Path) -> None:
    results, copy = tmp_path / "cpu.json", tmp_path / "README.md"
    shapes = ["--shapes", "quick-diptych-d64", "quick-text-cross"]
    assert table.main(["--quick", "--repeats", "1", "--threads", "1", *shapes, "--output", str(results)]) == 0
    copy.write_text(f"before\n{readme.BEGIN}\nold figures\n{readme.END}\nafter")
    section = readme.section(results)
    assert readme.update(copy, results) == bool(section)
    assert copy.read_text().startswith("before") and copy.read_text().endswith("after")
    assert "old figures" not in copy.read_text() or not section
    rows = [line for line in section.splitlines() if line.startswith("| (")]
    assert len(rows) in (0, 4)  # none without our kernel
    assert all(line.count("|") == rows[0].count("|") for line in rows)


@pytest.mark.parametrize("text", ["no markers", readme.END + readme.BEGIN, (readme.BEGIN + readme.END) * 2])
def test_markers_are_required(tmp_path: Path, text: str) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(text)
    with pytest.raises(ValueError, match="markers"):
        readme.update(copy, table.COMMITTED)
    assert copy.read_text() == text


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def test_code_runs() -> None:
    """The examples run; of those that need a checkpoint, what they import exists."""
    assert len(blocks(PAGE)) == 5
    for block in blocks(PAGE):
        if "from_pretrained" not in block:
            exec(compile(block, "README.md", "exec"), {})
            continue
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.ImportFrom)]
        for node in imports:
            exec(compile(ast.Module([node], []), "README.md", "exec"), {})


def test_a_method_of_your_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's method is short, runs, and changes what the model makes."""
    (block,) = blocks(PAGE.parent / "docs" / "methods.md")
    assert len(block.splitlines()) < 40
    page, plain = ModuleType("guide"), ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", page)  # a dataclass looks its module up
    torch.manual_seed(0)
    exec(compile(block, "methods.md", "exec"), page.__dict__)
    assert capsys.readouterr().out.startswith("tensor(")
    torch.manual_seed(0)
    exec(
        compile(block.replace("FadingPrompt()", "FadingPrompt(first=1.0)"), "methods.md", "exec"),
        plain.__dict__,
    )
    assert float((page.latents - plain.latents).abs().max()) > 1e-4


def test_every_method_is_in_the_table() -> None:
    listed = re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\|[^|]*\|", PAGE.read_text(), re.M)
    found = {
        name for name, thing in vars(methods).items() if isinstance(thing, type) and hasattr(thing, "plan")
    }
    # What methods gather maps with, and what looks without changing anything.
    helpers = {"AttentionMaps", "LocalBlend", "MutualBlend", "WordMaps"}
    assert sorted(listed) == sorted(found - helpers)


def test_local_links() -> None:
    """docs/demo.png is written by `make demo`."""
    for page in (PAGE, PAGE.parent / "docs" / "methods.md"):
        targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
        missing = [t for t in targets if not (page.parent / t).exists() and t != "docs/demo.png"]
        assert not missing
        assert targets or page != PAGE

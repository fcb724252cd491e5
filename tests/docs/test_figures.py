"""The figures in the pages are those of the committed measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashbrush.benchmarks.cpu import pages, table

from .markdown import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def marked(name: str, text: str = "old figures") -> str:
    return f"before\n<!-- figures: {name} (make them) -->\n{text}\n<!-- figures: end -->\nafter\n"


@pytest.mark.parametrize("page", pages.PAGES)
def test_figures_come_from_the_committed_files(page: str, tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text((ROOT / page).read_text())
    assert not pages.update(copy, RESULTS), f"run: {pages.COMMAND}"


@pytest.mark.parametrize("name", pages.GENERATED)
def test_every_table_is_on_a_page(name: str) -> None:
    assert any(f"<!-- figures: {name} ({pages.COMMAND}) -->" in (ROOT / p).read_text() for p in pages.PAGES)


@pytest.mark.parametrize("name", pages.GENERATED)
def test_rewritten_between_the_markers(name: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(marked(name))
    assert pages.update(page, RESULTS)
    new = page.read_text()
    assert new.startswith("before\n<!-- figures") and new.endswith("<!-- figures: end -->\nafter\n")
    assert "old figures" not in new
    cells = {line.count("|") for line in new.splitlines() if line.startswith("|")}
    assert len(cells) == 1, "the rows of the table have different numbers of cells"
    assert not pages.update(page, RESULTS)


@pytest.mark.parametrize("name", pages.GENERATED)
def test_no_figures_without_a_file(name: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(marked(name))
    pages.update(page, tmp_path)
    assert page.read_text() == marked(name, "").replace("\n\n", "\n")


def test_figures_of_a_run(tmp_path: Path) -> None:
    shapes = ["--shapes", "quick-diptych-d64", "quick-text-cross"]
    output = str(tmp_path / "cpu.json")
    assert table.main(["--quick", "--repeats", "1", "--threads", "1", *shapes, "--output", output]) == 0
    page = tmp_path / "page.md"
    page.write_text(marked("attention"))
    pages.update(page, tmp_path)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| (")]
    assert len(rows) in (0, 4)  # none without the cpu backend


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- figures: end -->",
        marked("attention") + "<!-- figures: attention (make them) -->",
        "<!-- figures: attention (make them) -->" + marked("attention"),
        marked("nonsense"),
    ],
)
def test_markers_are_checked(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="marker"):
        pages.update(page, RESULTS)
    assert page.read_text() == text

"""Relative links of the pages lead to files, and the README lists every method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashbrush.integrations import methods

from .markdown import ROOT, links, pages


@pytest.mark.parametrize("page", [*pages(), "CHANGELOG.md", "SECURITY.md", "benchmarks/results/README.md"])
def test_links_lead_to_files(page: str) -> None:
    folder = (ROOT / page).parent
    missing = [link for link in links(page) if not (folder / link.partition("#")[0]).exists()]
    assert not missing


def test_the_readme_is_short() -> None:
    """A landing page; the rest is in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_every_method_is_in_the_tables() -> None:
    """In the README's, and on a page of its own."""
    found = {
        name for name, thing in vars(methods).items() if isinstance(thing, type) and hasattr(thing, "plan")
    }
    # What methods gather maps with, and what observes without changing anything.
    found -= {"AttentionMaps", "LocalBlend", "MutualBlend", "WordMaps"}
    rows = re.findall(r"^\| (`\w+`.*?) \|", (ROOT / "README.md").read_text(), re.M)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row) if name in vars(methods)}
    entries = {
        name
        for page in Path(ROOT / "docs" / "methods").glob("*.md")
        for name in re.findall(r"^## ::: flashbrush\.integrations\.(\w+)$", page.read_text(), re.M)
    }
    assert listed == found
    assert found <= entries

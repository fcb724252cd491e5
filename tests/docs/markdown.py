"""The pages: where they are, their code and their links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = re.compile(r"<!-- not run: (?P<why>[^\n]+) -->\n$")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.M | re.S)


class Block(NamedTuple):
    """A block of code in a page."""

    page: str
    line: int
    language: str
    code: str
    not_run: str  # the reason that the comment before it gives; empty: it runs


def pages() -> list[str]:
    """README.md, CONTRIBUTING.md and every page of the site, from the repository's root."""
    site = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", *site]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        reason = NOT_RUN.search(before)
        indent = match[1]
        code = "".join(line.removeprefix(indent) for line in match[3].splitlines(keepends=True))
        found.append(Block(page, before.count("\n") + 1, match[2], code, reason["why"] if reason else ""))
    return found


def links(page: str) -> list[str]:
    """The relative targets of links and pictures, without those in code."""
    text = FENCE.sub("", (ROOT / page).read_text())
    return re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


def entries_of_the_pages() -> set[str]:
    """The names whose docstrings the pages render."""
    return {
        name
        for page in (ROOT / "docs").rglob("*.md")
        for name in re.findall(r"^#+ ::: (\S+)$", page.read_text(), re.M)
    }

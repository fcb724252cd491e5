"""What makes the build of the site fail: a public name without an entry, a link to a file that is not there."""

from __future__ import annotations

import re
import runpy
from types import SimpleNamespace
from typing import Any

import pytest

import flashbrush
import flashbrush.integrations
import flashbrush.integrations.diffusers
import flashbrush.integrations.pipelines

from .markdown import ROOT

pytest.importorskip("mkdocstrings")


def hook(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "_hooks" / f"{name}.py")))


def test_public_names_are_those_of_the_packages() -> None:
    """They are read without importing the package."""
    modules: tuple[Any, ...] = (
        flashbrush,
        flashbrush.integrations,
        flashbrush.integrations.pipelines,
        flashbrush.integrations.diffusers,
    )
    names = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    assert set(hook("public_names").public_names(ROOT)) == names - {"flashbrush.__version__"}


def test_a_name_without_an_entry_is_missing() -> None:
    public = hook("public_names")
    names = public.public_names(ROOT)
    entries = set(names)
    assert not public.missing(names, entries)
    for name in ("flashbrush.attention", "flashbrush.integrations.diffusers.apply"):
        assert public.missing(names, entries - names[name]) == [name]


def test_where_links_lead() -> None:
    source = hook("source_links")
    assert source.linked("docs/how-to/new-kernel.md", "../../kernels/segments.py") == "kernels/segments.py"
    assert source.site_uri("kernels/segments.py") == "source/kernels/segments.py.md"
    assert source.site_uri("docs/how-to/new-kernel.md") == "how-to/new-kernel.md"
    assert [
        m.groups() for m in source.LINK.finditer("[a](../a.py#f) [b](https://b.c) [c](#here) [d](/e)")
    ] == [("../a.py", "#f")]


def test_definitions_are_anchors() -> None:
    source = hook("source_links")
    text = "class A:\n    def f(self): ...\n\ndef g(): ...\n"
    assert source.definitions("a.py", text) == {"A": 1, "A.f": 2, "g": 4}
    page = source.source_page("a.py", text)
    assert '<span id="A.f"></span>' in page and '<span id="g"></span>' in page
    assert "<code>" in source.source_page("LICENSE", "text of no known language")


def test_entries_of_the_pages_exist() -> None:
    """Checked by the build too, but here in a second."""
    griffe = pytest.importorskip("griffe")
    package = griffe.load("flashbrush", search_paths=[str(ROOT / ".typing")])
    entries = {
        name
        for page in (ROOT / "docs").rglob("*.md")
        for name in re.findall(r"^#+ ::: (\S+)$", page.read_text(), re.M)
    }
    assert len(entries) > 50

    def exists(name: str) -> bool:
        try:
            return package[name.removeprefix("flashbrush.")] is not None
        except KeyError:
            return False

    assert not sorted(name for name in entries if not exists(name))

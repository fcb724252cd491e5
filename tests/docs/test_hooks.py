"""A public name without an entry and a link to a missing file fail the build of the site."""

from __future__ import annotations

import runpy
from types import SimpleNamespace
from typing import Any

import pytest

import flashbrush
import flashbrush.integrations
import flashbrush.integrations.diffusers
import flashbrush.integrations.pipelines

from .markdown import ROOT, entries_of_the_pages

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
    for page in (source.source_page("a.py", text), source.highlighted("a.py", text)):
        assert '<span id="A.f">' in page and '<span id="g">' in page
    assert source.highlighted("a.py", text).count("\n") == text.count("\n")
    assert "<code><span>text of" in source.highlighted("LICENSE", "text of no known language")


def test_entries_of_the_pages_exist() -> None:
    """Checked by the build too, but here in a second."""
    griffe = pytest.importorskip("griffe")
    package = griffe.load("flashbrush", search_paths=[str(ROOT / ".typing")])
    entries = entries_of_the_pages()
    assert len(entries) > 50

    def exists(name: str) -> bool:
        try:
            return package[name.removeprefix("flashbrush.")] is not None
        except KeyError:
            return False

    assert not sorted(name for name in entries if not exists(name))


def test_docstrings_are_read_as_they_are_meant() -> None:
    """A description that begins with > or - would be a quotation or a list, and the first words of Returns
    before a colon would be taken for its type.
    """
    griffe = pytest.importorskip("griffe")
    package = griffe.load(
        "flashbrush",
        search_paths=[str(ROOT / ".typing")],
        docstring_parser="google",
        docstring_options={"returns_multiple_items": False, "returns_named_value": False, "warnings": False},
    )
    wrong = []

    def read(entry: Any) -> None:
        for section in entry.docstring.parsed if entry.docstring else ():
            if section.kind.value == "returns" and isinstance(section.value[0].annotation, str):
                wrong.append(f"{entry.path}: Returns: {section.value[0].annotation}")
            if section.kind.value in ("parameters", "attributes"):
                wrong.extend(
                    f"{entry.path}: {item.name}: {item.description}"
                    for item in section.value
                    if item.description.startswith((">", "-", "#"))
                )
        for name, member in entry.members.items() if entry.is_class else ():
            if not name.startswith("_") and not member.is_alias:
                read(member)

    for name in sorted(entries_of_the_pages()):
        entry = package[name.removeprefix("flashbrush.")]
        entry = entry.final_target if entry.is_alias else entry
        read(entry.members.get(entry.name, entry) if entry.is_module else entry)
    assert not wrong

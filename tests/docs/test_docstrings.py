"""The examples in the docstrings of public names and of the pages' entries run and print what they say."""

from __future__ import annotations

import doctest
import inspect
import pkgutil

import pytest
import torch

import flashbrush
import flashbrush.integrations
import flashbrush.integrations.diffusers
import flashbrush.integrations.pipelines

from .markdown import entries_of_the_pages

PACKAGES = (
    flashbrush,
    flashbrush.integrations,
    flashbrush.integrations.pipelines,
    flashbrush.integrations.diffusers,
)
PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in PACKAGES
    for name in package.__all__
    if name != "__version__"
}
PUBLIC |= {
    name: pkgutil.resolve_name(":".join(name.rsplit(".", 1)))
    for name in sorted(entries_of_the_pages() - set(PUBLIC))
}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples(name: str) -> list[doctest.DocTest]:
    """Of a function, or of a class and its members."""
    found = doctest.DocTestFinder().find(PUBLIC[name], name)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", [name for name in PUBLIC if examples(name)])
def test_examples_run(name: str, stand_ins: dict[str, object]) -> None:
    report: list[str] = []
    with torch.random.fork_rng():
        for test in examples(name):
            test.globs = dict(stand_ins)
            doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append)
    assert not report, "".join(report)


def test_every_public_function_has_an_example() -> None:
    functions = [name for name, thing in PUBLIC.items() if inspect.isfunction(thing)]
    assert functions
    assert not [name for name in functions if not examples(name)]

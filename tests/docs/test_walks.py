"""The walks through the code in docs/architecture.md: each file is there, defines what the walk names, and is
reached by imports from the files before it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from .markdown import ROOT

PAGE = "docs/architecture.md"
# heading: the most files that it may take
WALKS = {"From `fb.attention` to a Triton launch": 8, "From `apply` to a controlled call": 6}
STEP = re.compile(r"^\d+\. \[([^\]]+)\]\(\.\./([^)#]+)(?:#([^)]+))?\)", re.M)
# The registry names the hosts in a table, as text, so that diffusers is imported only when it is needed.
REGISTRY = "integrations/diffusers/hosts/registry.py"


class Step(NamedTuple):
    text: str
    file: str
    definition: str | None


def walk(heading: str) -> list[Step]:
    text = (ROOT / PAGE).read_text()
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [Step(*found.groups()) for found in STEP.finditer(section)]


def imported(file: str) -> set[str]:
    """The files that a file imports, in functions and for type checkers too."""
    found: set[str] = set()
    tree = ast.parse((ROOT / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = Path(file).parents[node.level - 1] / (node.module or "").replace(".", "/")
            names = [folder / alias.name for alias in node.names]
            found |= {
                candidate
                for place in (folder, *names)
                for candidate in (f"{place}.py", f"{place}/__init__.py")
                if (ROOT / candidate).is_file()
            }
        if file == REGISTRY and isinstance(node, ast.Constant) and re.match(r"\.\w+$", str(node.value)):
            found.add((Path(file).parent / f"{str(node.value)[1:]}.py").as_posix())
    return found


def definitions(file: str) -> set[str]:
    names: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")

    visit(ast.parse((ROOT / file).read_text()), "")
    return names


@pytest.mark.parametrize("heading", WALKS)
def test_the_walk_is_short(heading: str) -> None:
    steps = walk(heading)
    assert 4 <= len(steps) <= WALKS[heading]
    assert len({step.file for step in steps}) == len(steps)


@pytest.mark.parametrize("heading", WALKS)
def test_files_and_functions_exist(heading: str) -> None:
    for step in walk(heading):
        assert step.text.replace("\\", "") == step.file
        assert (ROOT / step.file).is_file()
        assert step.definition is None or step.definition in definitions(step.file), step


@pytest.mark.parametrize("heading", WALKS)
def test_each_file_is_imported_by_one_before_it(heading: str) -> None:
    steps = [step.file for step in walk(heading)]
    reached = imported(steps[0])
    for file in steps[1:]:
        if REGISTRY in reached:
            reached |= imported(REGISTRY)
        assert file in reached, f"{file} is imported by none of the files before it"
        reached |= imported(file)


def test_a_wrong_walk_is_seen() -> None:
    assert "bindings/core/lowering.py" in imported("bindings/attention.py")
    assert "integrations/diffusers/apply.py" not in imported("bindings/attention.py")
    assert "attention" in definitions("bindings/attention.py")
    assert "no_such_function" not in definitions("bindings/attention.py")

"""Calls of the command line within the test's process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import flashbrush as fb
from flashbrush.__main__ import main

STEPS = ["--steps", "2"]


def flashbrush(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command: (exit code, standard output, standard error)."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def insert_arguments(
    photos: dict[str, Path], checkpoint: Path, folder: Path, **changes: object
) -> list[object]:
    """A valid call of insert with changes; None leaves an option out, ... makes it a flag."""
    given = {
        **photos,
        "prompt": "a red cup",
        "model": checkpoint,
        "output": folder / "out.png",
        "dtype": "float32",
        **changes,
    }
    arguments: list[object] = ["insert", *STEPS]
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        arguments += [] if value is None else [option] if value is ... else [option, value]
    return arguments


def refused(capsys, folder: Path, arguments: list, match: str) -> None:
    """Check for one line on standard error, exit code 2, and no new or changed file."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, out, err = flashbrush(capsys, *arguments)
    assert code == 2, (code, out, err)
    lines = [
        line
        for line in re.split(r"[\r\n]+", err)
        if line.strip() and "Loading pipeline components" not in line
    ]
    assert len(lines) == 1 and len(lines[0]) < 520, err
    assert re.search(f"^flashbrush: .*{match}", lines[0]), lines[0]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def conditions(folder: Path) -> dict:
    """The conditions beside the results in a folder, which name no folder."""
    text = (folder / "conditions.json").read_text()
    assert str(folder.parent) not in text and str(fb.tiny_fill().parent) not in text
    found = json.loads(text)
    assert {"cpu", "threads", "torch", "diffusers", "transformers", "flashbrush"} <= set(found["machine"])
    return found["conditions"]

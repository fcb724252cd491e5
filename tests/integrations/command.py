"""Calls of the command line inside the test's process."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashbrush.__main__ import main

STEPS = ["--steps", "2"]


def flashbrush(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def options(photos: dict[str, Path], checkpoint: Path, folder: Path, **changes: object) -> list[object]:
    """Of a good call of insert, with changes; None leaves one out, ... is a flag's."""
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

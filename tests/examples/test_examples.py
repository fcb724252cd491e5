"""Every example runs, says something, and leaves the pictures that it names."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "examples"
PICTURES = {
    "diffusers_drop_in": ["drop_in"],
    "insertion": ["insertion", "insertion_diptych"],
    "own_method": ["own_method"],
    "tensors": [],
    "visual_in_context": ["visual_in_context"],
}


def test_every_example_is_run() -> None:
    assert sorted(PICTURES) == sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", PICTURES)
def test_it_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        main = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]
        main(*[tmp_path] * bool(PICTURES[name]))
    assert capsys.readouterr().out
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(PICTURES[name])
    for path in tmp_path.iterdir():
        assert Image.open(path).convert("L").getextrema() != (0, 0)

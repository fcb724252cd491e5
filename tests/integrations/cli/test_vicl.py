"""flashbrush vicl on real photos with a tiny checkpoint: its files, its output, and wrong input."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flashbrush.integrations.cli import vicl as cli_vicl
from flashbrush.integrations.pipelines import VisualICLOutput
from flashbrush.integrations.pipelines.inversion.cache import InversionCache
from flashbrush.integrations.pipelines.shared.visual_icl_tasks import TASKS

from ..command import flashbrush, refused
from .vicl_files import QUICK, SIZE, folder_of_another_model, mask, photo


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """cat, its mask, coffee, and the cat at another size."""
    pictures = {
        "cat": photo("chelsea"),
        "mask": mask("chelsea"),
        "coffee": photo("coffee"),
        "small": photo("cat", (32, 48)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in pictures}


def call(files: dict[str, Path], checkpoint: Path, folder: Path, **changes: object) -> list[object]:
    """A valid call with changes; None leaves an option out."""
    given = {
        "prompt": f"{files['cat']}:{files['mask']}",
        "query": files["coffee"],
        "task": "segmentation",
        "model": checkpoint,
        "output": folder / "out.png",
        "cache": folder / "cache",
        **changes,
    }
    return [
        "vicl",
        *QUICK,
        *(x for name, value in given.items() if value is not None for x in (f"--{name}", value)),
    ]


def test_runs_are_equal_with_and_without_the_cache(capsys, files, sd_checkpoint, tmp_path) -> None:
    given = call(files, sd_checkpoint, tmp_path, painted=tmp_path / "painted.png")
    code, out, err = flashbrush(capsys, *given)
    assert code == 0, err
    assert f"0 of 3 inversions were there already, in {tmp_path / 'cache'}" in out and "out.png" in out
    first = [(tmp_path / name).read_bytes() for name in ("out.png", "painted.png")]
    picture, painted = Image.open(tmp_path / "out.png"), Image.open(tmp_path / "painted.png")
    assert picture.size == painted.size == SIZE and set(picture.convert("L").tobytes()) <= {0, 255}
    expected = np.asarray(painted.convert("L"), np.float32) / 255 > 0.5
    assert np.array_equal(np.asarray(picture.convert("L")) > 0, expected) and np.asarray(painted).std() > 1

    code, out, _ = flashbrush(capsys, *given)
    assert code == 0 and "3 of 3 inversions were there already" in out
    assert [(tmp_path / name).read_bytes() for name in ("out.png", "painted.png")] == first
    shutil.rmtree(tmp_path / "cache")
    code, out, _ = flashbrush(capsys, *given, "--no-cached")
    assert code == 0 and "inversions" not in out and not (tmp_path / "cache").exists()
    assert [(tmp_path / name).read_bytes() for name in ("out.png", "painted.png")] == first


def test_every_option_reaches_the_pipeline(capsys, files, tmp_path, monkeypatch) -> None:
    seen: dict[str, Any] = {}

    def load(*given: object, **more: object) -> Any:
        def pipe(pairs: list, query: Image.Image, **knobs: Any) -> VisualICLOutput:
            seen.update(knobs, pairs=len(pairs), given=given, **more)
            return VisualICLOutput(query, None, query, torch.zeros(1), query.size, knobs["task"], None, 0, 0)

        pipe.cache = InversionCache(tmp_path)  # type: ignore[attr-defined]
        return pipe

    monkeypatch.setattr(cli_vicl, "load", load)

    def knobs(*more: object) -> dict[str, Any]:
        seen.clear()
        code, _, err = flashbrush(capsys, *call(files, tmp_path / "model", tmp_path), *more)
        assert code == 0, err
        return {**asdict(seen["method"]), **seen}  # `steps` of the call hides the method's

    first = knobs()
    assert first["given"][0] == "VisualICLPipeline" and first["steps"] == 3 and first["gamma"] == 3.5
    pair = f"{files['coffee']}:{files['mask']}"
    for more, name, value in (
        (["--steps", 4], "steps", 4),
        (["--skip", 2], "skip", 2),
        (["--gamma", 0], "gamma", 0),
        (["--seed", 1], "seed", 1),
        (["--temperature", 5], "temperature", 5),
        (["--contrast", 3], "contrast", 3),
        (["--no-clip"], "clip", None),
        (["--no-adain"], "use_adain", False),
        (["--width", 48], "width", 48),
        (["--height", 48], "height", 48),
        (["--no-cached"], "use_cache", False),
        (["--cache", files["cat"].parent], "cache", files["cat"].parent),
        (["--prompt", pair], "pairs", 2),
        (["--task", "edges"], "task", "edges"),
    ):
        assert knobs(*more)[name] == value != first[name], more


def test_prints_the_sizes_when_images_are_resized(capsys, files, sd_checkpoint, tmp_path) -> None:
    given = call(files, sd_checkpoint, tmp_path, query=files["small"])
    code, out, err = flashbrush(capsys, *given, "--width", 32, "--height", 40)
    assert code == 0, err
    assert "32x48" in out and "32x40" in out and Image.open(tmp_path / "out.png").size == (32, 48)


def test_help_names_the_tasks(capsys) -> None:
    code, out, _ = flashbrush(capsys, "vicl", "--help")
    assert code == 0 and all(task in out for task in TASKS)


BAD = {
    "a model without a UNet": (
        lambda f, t: {"model": folder_of_another_model(t)},
        "model: .*flux is no UNet model",
    ),
    "no model folder": (lambda f, t: {"model": t / "none"}, "model: no such folder"),
    "half a pair": (
        lambda f, t: {"prompt": f"{f['cat']}:"},
        "prompt: expected a pair IMAGE:TRUTH, got one of them",
    ),
    "no colon": (lambda f, t: {"prompt": f["cat"]}, "prompt: expected a pair IMAGE:TRUTH, got one file"),
    "three files": (lambda f, t: {"prompt": f"{f['cat']}:{f['mask']}:x"}, "prompt: .*more than one colon"),
    "no prompt": (lambda f, t: {"prompt": None}, "Missing option .*--prompt"),
    "a truth of another size": (
        lambda f, t: {"prompt": f"{f['cat']}:{f['small']}"},
        r"prompts\[0\]: .*its image's size, 64x48 .*32x48",
    ),
    "a query of another size": (
        lambda f, t: {"query": f["small"]},
        r"prompts\[0\]: .*query's size, 32x48 .*give width",
    ),
    "no such truth": (
        lambda f, t: {"prompt": f"{f['cat']}:{t / 'none.png'}"},
        r"prompts\[0\]: ground truth: no such file",
    ),
    "no such query": (lambda f, t: {"query": t / "none.png"}, "query: no such file"),
    "an unknown task": (lambda f, t: {"task": "depth"}, "task: expected one of segmentation, .*'depth'"),
    "a truth that is a photo": (
        lambda f, t: {"task": "semantic", "prompt": f"{f['cat']}:{f['cat']}"},
        "palette: .*at most 256 colours",
    ),
    "nothing to do": (lambda f, t: {"skip": 3}, "skip: expected an integer from 0 to 2"),
    "a temperature of 0": (lambda f, t: {"temperature": 0}, "temperature: "),
    "a gamma without end": (lambda f, t: {"gamma": "inf"}, "gamma: .*inf"),
    "a width off the grid": (lambda f, t: {"width": 30}, "width: .*multiple of 8"),
    "a file for a cache": (lambda f, t: {"cache": f["cat"]}, "cache: expected a folder, got a file"),
    "an output that is no picture": (lambda f, t: {"output": t / "out.txt"}, "output: .*out.txt"),
    "two outputs in one": (
        lambda f, t: {"painted": t / "work" / "out.png"},
        "painted: expected another file than output",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused(case: str, capsys, files, sd_checkpoint, tmp_path) -> None:
    change, match = BAD[case]
    (tmp_path / "work").mkdir()
    changes = change(files, tmp_path)
    refused(capsys, tmp_path, call(files, sd_checkpoint, tmp_path / "work", **changes), match)

"""flashbrush eval vicl on real photos with a tiny checkpoint: its table, its pictures, and wrong input."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashbrush.integrations.evaluation.visual_icl.items import Pair, write_pairs

from ..command import flashbrush, refused
from .vicl_files import QUICK, folder_of_another_model, mask, photo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = {"cat": "chelsea", "coffee": "coffee", "rocket": "rocket"}
    pairs = [Pair(n, photo(p), mask(p), () if n == "cat" else ("cat",)) for n, p in names.items()]
    write_pairs(pairs, tmp_path / "pairs")
    return tmp_path / "pairs"


def arguments_of(
    folder: Path, model: Path, work: Path, *more: object, task: str = "segmentation"
) -> list[object]:
    return [
        "eval",
        "vicl",
        folder,
        "--task",
        task,
        "--model",
        model,
        "-o",
        work / "results.csv",
        "--cache",
        work / "cache",
        *QUICK,
        *more,
    ]


def test_measures_equal_those_of_the_written_pictures(capsys, folder, sd_checkpoint, tmp_path) -> None:
    given = arguments_of(folder, sd_checkpoint, tmp_path, "--pictures", tmp_path / "predictions")
    code, out, err = flashbrush(capsys, *given)
    assert code == 0, err
    assert "2 of 6 inversions" in out  # both queries have the same prompt
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["name"] for row in rows] == ["coffee", "rocket", "(all)"]
    ious = []
    for row in rows[:2]:
        found, truth = (
            np.asarray(Image.open(path).convert("L")) > 127
            for path in (tmp_path / "predictions" / f"{row['name']}.png", folder / f"{row['name']}_truth.png")
        )
        ious.append((found & truth).sum() / (found | truth).sum())
        assert float(row["miou"]) == pytest.approx(ious[-1], abs=1e-6)
    assert float(rows[2]["miou"]) == pytest.approx(np.mean(ious), abs=1e-6)
    assert "miou" in out and f"{np.mean(ious):.4f}" in out

    before = (tmp_path / "results.csv").read_bytes()
    code, out, _ = flashbrush(capsys, *given)
    assert code == 0 and "6 of 6 inversions" in out and (tmp_path / "results.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("task", "measures"), [("colourisation", ["fid_latents"]), ("keypoints", ["mse", "pck"])]
)
def test_each_task_writes_its_measures(
    task: str, measures: list[str], capsys, folder, sd_checkpoint, tmp_path
) -> None:
    code, _, err = flashbrush(capsys, *arguments_of(folder, sd_checkpoint, tmp_path, task=task))
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert list(rows[-1]) == ["name", *measures] and all(
        np.isfinite(float(rows[-1][name])) for name in measures
    )


def break_list(folder: Path) -> Path:
    path = folder / "pairs.csv"
    path.write_text(path.read_text().replace("cat\n", "dog\n"))
    return folder


def other_size(folder: Path) -> Path:
    for name in ("cat_image.png", "cat_truth.png"):
        photo("cat", (32, 48)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (lambda f, m, w: arguments_of(w, m, w), "folder: expected a list of pairs"),
        (lambda f, m, w: arguments_of(break_list(f), m, w), "folder: .*'dog' of coffee is not listed"),
        (
            lambda f, m, w: arguments_of(other_size(f), m, w),
            "folder: cat has another size than coffee.*--width",
        ),
        (lambda f, m, w: arguments_of(f, m, w, task="depth"), "task: .*'depth'"),
        (
            lambda f, m, w: arguments_of(f, folder_of_another_model(w.parent), w),
            "model: .*flux is no UNet model",
        ),
        (lambda f, m, w: [*arguments_of(f, m, w), "-o", w / "results.txt"], "output: .*csv.*results.txt"),
        (
            lambda f, m, w: arguments_of(f, m, w, "--features", "eyes", task="colourisation"),
            "features: .*'eyes'",
        ),
        (lambda f, m, w: arguments_of(f, m, w, "--reach", 0, task="keypoints"), "reach: .*0"),
        (
            lambda f, m, w: arguments_of(f, m, w, "--pictures", f / "pairs.csv"),
            "pictures: expected a folder, got a file",
        ),
        (lambda f, m, w: ["eval"], "Missing command"),
    ],
)
def test_wrong_input_is_refused(arguments, match: str, capsys, folder, sd_checkpoint, tmp_path) -> None:
    (tmp_path / "work").mkdir()
    given = arguments(folder, sd_checkpoint, tmp_path / "work")
    refused(capsys, tmp_path, given, match)

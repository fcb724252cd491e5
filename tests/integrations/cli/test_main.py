"""The command line: what it writes, what it says, and that it writes all or nothing."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flashbrush as fb
from flashbrush.integrations.evaluation.insertion.items import held_out, read_items, write_items

from ..command import STEPS, flashbrush, options


def test_insert(capsys, photos, checkpoint, tmp_path) -> None:
    code, out, err = flashbrush(
        capsys, *options(photos, checkpoint, tmp_path, report=tmp_path / "report.png")
    )
    assert code == 0, err
    photo, mask = np.asarray(Image.open(photos["image"])), np.asarray(Image.open(photos["mask"]))
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert (picture[mask == 0] == photo[mask == 0]).all() and (picture[mask > 0] != photo[mask > 0]).any()
    assert Image.open(tmp_path / "report.png").size[0] > 1000
    assert "out.png" in out and "report.png" in out


def test_every_knob_reaches_the_picture(capsys, photos, checkpoint, tmp_path) -> None:
    def picture(**changes: object) -> bytes:
        path = tmp_path / "knob.png"
        code, _, err = flashbrush(capsys, *options(photos, checkpoint, tmp_path, output=path, **changes))
        assert code == 0, err
        return Image.open(path).tobytes()

    first = picture()
    assert picture() == first
    knobs = {
        "alpha_prompt": 0.9,
        "alpha_subject": 0.9,
        "gain_span": 0.8,
        "gain_norm": "softmax",
        "seed": 5,
        "guidance": 2.0,
        "prompt": "a blue dog",
        "padding_mask_crop": 3,
        "subject_fill": 0.5,
    }
    for knob, value in knobs.items():
        assert picture(**{knob: value}) != first, knob


def test_sizes_are_said_aloud(capsys, photos, checkpoint, tmp_path) -> None:
    code, out, _ = flashbrush(capsys, *options(photos, checkpoint, tmp_path, width=32))
    assert code == 0 and "64x48" in out and "32x24" in out
    assert Image.open(tmp_path / "out.png").size == (64, 48)


def test_a_camera_s_orientation_counts(capsys, photos, checkpoint, tmp_path) -> None:
    upright = Image.open(photos["image"])
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    turned.save(tmp_path / "camera.png", exif=exif)
    code, _, err = flashbrush(capsys, *options(photos, checkpoint, tmp_path, image=tmp_path / "camera.png"))
    assert code == 0, err
    mask = np.asarray(Image.open(photos["mask"]))
    assert (np.asarray(Image.open(tmp_path / "out.png"))[mask == 0] == np.asarray(upright)[mask == 0]).all()


def test_info(capsys) -> None:
    code, out, _ = flashbrush(capsys, "info")
    assert code == 0
    for word in ("cpu", "triton", "composed", "reference", "torch", "diffusers", "threads"):
        assert word in out


def test_insert_without_a_model_takes_the_tiny_one(capsys, photos, checkpoint, tmp_path) -> None:
    code, out, err = flashbrush(capsys, *options(photos, checkpoint, tmp_path, model=None))
    assert code == 0, err
    assert "no --model is given" in out and str(fb.tiny_fill()) in out and "64x64" in out
    photo, mask = np.asarray(Image.open(photos["image"])), np.asarray(Image.open(photos["mask"]))
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert (picture[mask == 0] == photo[mask == 0]).all() and (picture[mask > 0] != photo[mask > 0]).any()
    said = options(photos, checkpoint, tmp_path, width=32, output=tmp_path / "small.png", model=None)
    code, out, _ = flashbrush(capsys, *said)
    assert code == 0 and "32x64" in out


def test_demo(capsys, tmp_path) -> None:
    pytest.importorskip("skimage")
    code, out, err = flashbrush(capsys, "demo", "-o", tmp_path / "demo", *STEPS)
    assert code == 0, err
    assert str(tmp_path / "demo" / "report.png") in out and "seconds for an insertion" in out
    items = read_items(tmp_path / "demo" / "photos")
    assert len(items) >= 4
    for item in items:
        scene, mask = np.asarray(item.image), np.asarray(item.mask)
        result = np.asarray(Image.open(tmp_path / "demo" / f"{item.name}.png"))
        assert (result[mask == 0] == scene[mask == 0]).all() and (result[mask > 0] != scene[mask > 0]).any()
    assert Image.open(tmp_path / "demo" / "report.png").size[1] > 1000
    assert flashbrush(capsys, "demo", "-o", tmp_path / "demo", *STEPS)[0] == 0


def conditions(folder: Path) -> dict:
    """Of the results in a folder; whose file names nobody's folders."""
    text = (folder / "conditions.json").read_text()
    assert str(folder.parent) not in text and str(fb.tiny_fill().parent) not in text
    found = json.loads(text)
    assert {"cpu", "threads", "torch", "diffusers", "transformers", "flashbrush"} <= set(found["machine"])
    return found["conditions"]


def test_eval_insert(capsys, tmp_path) -> None:
    pytest.importorskip("torchmetrics")
    code, out, err = flashbrush(capsys, "eval", "insert", "-o", tmp_path / "made", "--count", "2", *STEPS)
    assert code == 0, err
    with (tmp_path / "made" / "table.csv").open() as file:
        table = {row.pop("measure"): row for row in csv.DictReader(file)}
    assert set(table["pattern"]) == {
        "own reference",
        "blank reference",
        "stranger reference",
        "contradiction",
    }
    assert {"psnr_hole", "psnr_outside", "pattern", "palette", "fid"} <= set(table) and "pattern" in out
    with (tmp_path / "made" / "items.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["sort"] for row in rows} == set(table["pattern"])
    assert Image.open(tmp_path / "made" / "pictures.png").size[0] > 200
    said = conditions(tmp_path / "made")
    assert (
        said["items"] == dict.fromkeys(table["pattern"], 2)
        and said["model"] == "tiny_fill"
        and said["freedom"] == 0
    )
    assert (said["steps"], said["guidance"], said["seed"], said["device"]) == (2, 30, 0, "cpu")

    write_items(held_out(2), tmp_path / "photos")
    command = [
        "eval",
        "insert",
        tmp_path / "photos",
        "-o",
        tmp_path / "own",
        "--alpha-subject",
        "0.5",
        *STEPS,
    ]
    code, _, err = flashbrush(capsys, *command)
    assert code == 0, err
    with (tmp_path / "own" / "items.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["alpha_subject"] for row in rows] == ["0.5", "0.5"] and float(rows[0]["psnr_outside"]) == 100
    said = conditions(tmp_path / "own")
    assert (
        said["items"] == {"all": 2}
        and said["folder"] == "photos"
        and said["alpha_subject"] == 0.5
        and "freedom" not in said
    )


def test_sweep(capsys, tmp_path) -> None:
    output = tmp_path / "sweep"
    command = [
        "sweep",
        "-o",
        output,
        "--count",
        "2",
        "--axis",
        "alpha_subject=0,0.9",
        "--axis",
        "blend=0,1",
        *STEPS,
    ]
    code, out, err = flashbrush(capsys, *command)
    assert code == 0, err
    with (output / "sweep.csv").open() as file:
        rows = {(row["axis"], row["value"], row["measure"]): row for row in csv.DictReader(file)}
    assert float(rows["alpha_subject", "0", "pattern"]["difference"]) == 0
    assert float(rows["alpha_subject", "0.9", "pattern"]["difference"]) != 0
    assert float(rows["blend", "False", "psnr_outside"]["difference"]) != 0
    assert ("adaptive", "alpha_subject by palette", "pattern") in rows and "alpha_subject" in out
    assert Image.open(output / "sweep.png").size[0] > 500
    said = conditions(output)
    assert said["items"] == {"reference": 2, "contradiction": 2} and said["axis"] == [
        "alpha_subject=0,0.9",
        "blend=0,1",
    ]


def test_bench(capsys) -> None:
    arguments = [
        "--quick",
        "--shapes",
        "quick-diptych-d64",
        "--dtypes",
        "float32",
        "--sections",
        "forward",
        "--repeats",
        "1",
    ]
    code, out, err = flashbrush(capsys, "bench", *arguments)
    assert code == 0, err
    assert "SDPA" in out and "eager" in out
    code, _, err = flashbrush(capsys, "bench", "--shapes", "round")
    assert code == 2 and err.startswith("flashbrush: --shapes: unknown round") and len(err.splitlines()) == 1


def test_help_is_quick_and_module_runs() -> None:
    code = (
        "import sys; from flashbrush import __main__ as cli\n"
        "try: cli.main(['insert', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-m", "flashbrush", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "insert" in done.stdout


def test_a_failure_late_writes_nothing(capsys, photos, checkpoint, tmp_path, monkeypatch) -> None:
    from flashbrush.integrations.cli.shared import figures

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(figures, "insertion_report", fail)
    folder = tmp_path / "work"
    folder.mkdir()
    code, _, err = flashbrush(capsys, *options(photos, checkpoint, folder, report=folder / "report.png"))
    assert code == 2 and "disk full" in err and list(folder.iterdir()) == []

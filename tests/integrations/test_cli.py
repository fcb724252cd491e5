"""The command line: what it writes, what it says, and that wrong input costs one line, exit code 2, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashbrush.integrations.cli import main

STEPS = ["--steps", "2"]


def flashbrush(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def options(photos: dict[str, Path], checkpoint: Path, folder: Path, **changes: object) -> list[object]:
    """Of a good call of insert, with changes; None leaves one out."""
    given = {**photos, "prompt": "a red cup", "model": checkpoint, "output": folder / "out.png", "dtype": "float32", **changes}
    arguments: list[object] = ["insert", *STEPS]
    for name, value in given.items():
        arguments += [] if value is None else [f"--{name.replace('_', '-')}", value]
    return arguments


def test_insert(capsys, photos, checkpoint, tmp_path) -> None:
    code, out, err = flashbrush(capsys, *options(photos, checkpoint, tmp_path, report=tmp_path / "report.png"))
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
    knobs = {"alpha_prompt": 0.9, "alpha_subject": 0.9, "gain_span": 0.8, "gain_norm": "softmax", "seed": 5, "guidance": 2.0,
             "prompt": "a blue dog"}  # fmt: skip
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


def test_demo(capsys, tmp_path) -> None:
    pytest.importorskip("skimage")
    code, out, err = flashbrush(capsys, "demo", "-o", tmp_path / "demo", *STEPS)
    assert code == 0, err
    assert str(tmp_path / "demo" / "result.png") in out
    scene, mask = (np.asarray(Image.open(tmp_path / "demo" / f"{n}.png")) for n in ("scene", "mask"))
    result = np.asarray(Image.open(tmp_path / "demo" / "result.png"))
    assert (result[mask == 0] == scene[mask == 0]).all() and (result[mask > 0] != scene[mask > 0]).any()
    assert (tmp_path / "demo" / "checkpoint" / "model_index.json").is_file()
    assert flashbrush(capsys, "demo", "-o", tmp_path / "demo", *STEPS)[0] == 0


def test_bench(capsys) -> None:
    arguments = ["--quick", "--shapes", "quick-diptych-d64", "--dtypes", "float32", "--sections", "forward", "--repeats", "1"]
    code, out, err = flashbrush(capsys, "bench", *arguments)
    assert code == 0, err
    assert "SDPA" in out and "eager" in out
    code, _, err = flashbrush(capsys, "bench", "--shapes", "round")
    assert code == 2 and err.startswith("flashbrush: --shapes: unknown round") and len(err.splitlines()) == 1


def test_help_is_quick_and_module_runs() -> None:
    code = (
        "import sys; from flashbrush.integrations import cli\n"
        "try: cli.main(['insert', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-m", "flashbrush", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "insert" in done.stdout


class Bad:
    """Files that must not be taken."""

    def __init__(self, folder: Path, photos: dict[str, Path], checkpoint: Path) -> None:
        self.folder, self.photos, self.checkpoint = folder, photos, checkpoint

    def text(self) -> Path:
        (self.folder / "letter.png").write_text("Dear reader")
        return self.folder / "letter.png"

    def empty(self) -> Path:
        (self.folder / "empty.png").touch()
        return self.folder / "empty.png"

    def cut(self) -> Path:
        path = self.folder / "cut.png"
        path.write_bytes(self.photos["image"].read_bytes()[:900])
        return path

    def huge(self) -> Path:
        Image.new("1", (20000, 20000)).save(self.folder / "huge.png")
        return self.folder / "huge.png"

    def floats(self) -> Path:
        Image.new("F", (64, 48), 0.5).save(self.folder / "floats.tiff")
        return self.folder / "floats.tiff"

    def script(self) -> Path:
        (self.folder / "figure.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\nshowpage\n")
        return self.folder / "figure.eps"

    def flat(self, level: int, size: tuple[int, int] = (64, 48)) -> Path:
        Image.new("L", size, level).save(self.folder / f"flat{level}.png")
        return self.folder / f"flat{level}.png"

    def transparent(self) -> Path:
        Image.new("RGBA", (64, 48), (9, 9, 9, 0)).save(self.folder / "ghost.png")
        return self.folder / "ghost.png"

    def model_without(self, part: str) -> Path:
        target = self.folder / "model"
        shutil.copytree(self.checkpoint, target)
        shutil.rmtree(target / part)
        return target

    def model_of_pickles(self) -> Path:
        target = self.folder / "model"
        shutil.copytree(self.checkpoint, target)
        weights = target / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        return target


BAD = {
    "no such image": (lambda b: {"image": b.folder / "none.png"}, "image: no such file"),
    "a folder for an image": (lambda b: {"image": b.folder}, "image: expected an image file, got a folder"),
    "text for an image": (lambda b: {"image": b.text()}, "image: .*letter.png is not an image"),
    "an empty file": (lambda b: {"image": b.empty()}, "image: .*empty.png is not an image"),
    "a file cut off": (lambda b: {"image": b.cut()}, "image: .*cut.png is damaged"),
    "400 megapixels": (lambda b: {"image": b.huge()}, "image: .*64 megapixels"),
    "floating-point pixels": (lambda b: {"image": b.floats()}, "image: .*floating-point pixels"),
    "a format that runs programs": (lambda b: {"subject": b.script()}, "subject: .*not an image"),
    "no such subject": (lambda b: {"subject": b.folder / "none.png"}, "subject: no such file"),
    "text for a subject": (lambda b: {"subject": b.text()}, "subject: .*not an image"),
    "an invisible subject": (lambda b: {"subject": b.transparent(), "subject_mask": None}, "subject: its transparency: nothing"),
    "no such mask": (lambda b: {"mask": b.folder / "none.png"}, "mask: no such file"),
    "text for a mask": (lambda b: {"mask": b.text()}, "mask: .*not an image"),
    "a mask of another size": (lambda b: {"mask": b.photos["subject_mask"]}, "mask: expected .*64x48 pixels, got 40x30"),
    "an empty mask": (lambda b: {"mask": b.flat(0)}, "mask: nothing is on"),
    "a full mask": (lambda b: {"mask": b.flat(255)}, "mask: everything is on"),
    "a subject mask of another size": (lambda b: {"subject_mask": b.photos["mask"]}, "subject_mask: .*40x30.*64x48"),
    "an empty subject mask": (lambda b: {"subject_mask": b.flat(0, (40, 30))}, "subject_mask: nothing is on"),
    "mask and name": (lambda b: {"subject_name": "cup"}, "subject_mask: expected it or subject_name"),
    "no mask": (lambda b: {"mask": None}, "Missing option .*--mask"),
    "no prompt": (lambda b: {"prompt": None}, "Missing option .*--prompt"),
    "no model": (lambda b: {"model": None}, "model: insert needs one: give --model"),
    "a model folder that is not there": (lambda b: {"model": b.folder / "none"}, "model: no such folder"),
    "a file for a model": (lambda b: {"model": b.photos["image"]}, "model: expected a diffusers folder .* got a file"),
    "an empty model folder": (lambda b: {"model": b.folder}, "model: .*no model_index.json"),
    "a model without a transformer": (lambda b: {"model": b.model_without("transformer")}, "model: .*no transformer"),
    "a model without a tokenizer": (lambda b: {"model": b.model_without("tokenizer_2")}, "model: .*no tokenizer_2"),
    "a model of pickles": (lambda b: {"model": b.model_of_pickles()}, "safetensors"),
    "an unknown backend": (lambda b: {"backend": "fast"}, "backend: expected auto or one of cpu.*'fast'"),
    "an unusable backend": (lambda b: {"backend": "triton"}, "backend: 'triton' .*"),
    "an unknown dtype": (lambda b: {"dtype": "int8"}, "Invalid value for .*dtype"),
    "an unknown device": (lambda b: {"device": "abacus"}, "device: 'abacus' is not usable"),
    "a negative weight": (lambda b: {"alpha_subject": -1.5}, r"alpha_subject: .*-1\.5"),
    "no number": (lambda b: {"alpha_prompt": "much"}, "Invalid value for .*alpha-prompt"),
    "not finite": (lambda b: {"gain_span": "nan"}, "gain_span: .*nan"),
    "an unknown norm": (lambda b: {"gain_norm": "cube"}, "Invalid value for .*gain-norm"),
    "no steps": (lambda b: {"steps": 0}, "Invalid value for .*steps"),
    "a negative seed": (lambda b: {"seed": -1}, "Invalid value for .*seed"),
    "a width off the grid": (lambda b: {"width": 33}, "width: .*multiple of 8.*33"),
    "a negative height": (lambda b: {"height": -16}, "height: .*-16"),
    "an output without a folder": (lambda b: {"output": b.folder / "no" / "out.png"}, "output: no such folder"),
    "a folder for an output": (lambda b: {"output": b.folder}, "output: expected a file"),
    "an output that is no picture": (lambda b: {"output": b.folder / "out.txt"}, "output: .*out.txt"),
    "a report that is no picture": (lambda b: {"report": b.folder / "report.docx"}, "report: .*report.docx"),
    "an unknown option": (lambda b: {"colour": "red"}, "No such option.*--colour"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, capsys, photos, checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    change, match = BAD[case]
    folder = tmp_path / "work"
    folder.mkdir()
    given = options(photos, checkpoint, folder, **change(Bad(folder, photos, checkpoint)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, out, err = flashbrush(capsys, *given)
    assert code == 2, (code, out, err)
    lines = [line for line in err.splitlines() if line.startswith("flashbrush: ")]
    assert len(lines) == 1 and "Traceback" not in err
    assert re.search(match, lines[0]), lines[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_failure_late_writes_nothing(capsys, photos, checkpoint, tmp_path, monkeypatch) -> None:
    from flashbrush.integrations import report

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report, "insertion_report", fail)
    folder = tmp_path / "work"
    folder.mkdir()
    code, _, err = flashbrush(capsys, *options(photos, checkpoint, folder, report=folder / "report.png"))
    assert code == 2 and "disk full" in err and list(folder.iterdir()) == []

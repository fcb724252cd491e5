"""Wrong input on the command line: one line on standard error, exit code 2, and nothing is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image

from flashbrush.integrations import InContextBrushPipeline
from flashbrush.integrations.cli import main as cli
from flashbrush.integrations.cli.shared import output

from ..command import insert_arguments, refused


class BadFiles:
    """Makes files that must be refused."""

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
        (self.folder / "figure.eps").write_text(
            "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\nshowpage\n"
        )
        return self.folder / "figure.eps"

    def flat(self, level: int, size: tuple[int, int] = (64, 48)) -> Path:
        Image.new("L", size, level).save(self.folder / f"flat{level}.png")
        return self.folder / f"flat{level}.png"

    def transparent(self) -> Path:
        Image.new("RGBA", (64, 48), (9, 9, 9, 0)).save(self.folder / "ghost.png")
        return self.folder / "ghost.png"

    def model(self) -> Path:
        return Path(shutil.copytree(self.checkpoint, self.folder / "model"))

    def model_without(self, part: str) -> Path:
        shutil.rmtree((model := self.model()) / part)
        return model

    def model_of_pickles(self) -> Path:
        weights = (model := self.model()) / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        return model

    def model_with(self, file: str, content: bytes) -> Path:
        ((model := self.model()) / file).write_bytes(content)
        return model

    def model_without_mask_channels(self) -> Path:
        """As FLUX.1-dev: latents in, latents out."""
        from diffusers import FluxTransformer2DModel

        config = dict(FluxTransformer2DModel.load_config(self.checkpoint / "transformer"))
        transformer = FluxTransformer2DModel.from_config({**config, "in_channels": config["out_channels"]})
        transformer.save_pretrained((model := self.model()) / "transformer")
        return model


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
    "an invisible subject": (
        lambda b: {"subject": b.transparent(), "subject_mask": None},
        "subject: its transparency: nothing",
    ),
    "the photo for an output": (
        lambda b: {"output": b.photos["image"]},
        "output: expected another file than image",
    ),
    "a width beyond reason": (lambda b: {"width": 1_600_000_000}, "width: expected at most 64 megapixels"),
    "no such mask": (lambda b: {"mask": b.folder / "none.png"}, "mask: no such file"),
    "text for a mask": (lambda b: {"mask": b.text()}, "mask: .*not an image"),
    "a mask of another size": (
        lambda b: {"mask": b.photos["subject_mask"]},
        "mask: expected .*64x48 pixels, got 40x30",
    ),
    "an empty mask": (lambda b: {"mask": b.flat(0)}, "mask: nothing is on"),
    "a full mask": (lambda b: {"mask": b.flat(255)}, "mask: everything is on"),
    "a subject mask of another size": (
        lambda b: {"subject_mask": b.photos["mask"]},
        "subject_mask: .*40x30.*64x48",
    ),
    "an empty subject mask": (lambda b: {"subject_mask": b.flat(0, (40, 30))}, "subject_mask: nothing is on"),
    "mask and name": (lambda b: {"subject_name": "cup"}, "subject_mask: expected it or subject_name"),
    "no mask": (lambda b: {"mask": None}, "Missing option .*--mask"),
    "no prompt": (lambda b: {"prompt": None}, "Missing option .*--prompt"),
    "a model folder that is not there": (lambda b: {"model": b.folder / "none"}, "model: no such folder"),
    "a file for a model": (
        lambda b: {"model": b.photos["image"]},
        "model: expected a diffusers folder .* got a file",
    ),
    "an empty model folder": (lambda b: {"model": b.folder}, "model: .*no model_index.json"),
    "a model without a transformer": (
        lambda b: {"model": b.model_without("transformer")},
        "model: .*no transformer",
    ),
    "a model without a tokenizer": (
        lambda b: {"model": b.model_without("tokenizer_2")},
        "model: .*no tokenizer_2",
    ),
    "a model of pickles": (lambda b: {"model": b.model_of_pickles()}, "safetensors"),
    "a model whose weights are cut off": (
        lambda b: {"model": b.model_with("vae/diffusion_pytorch_model.safetensors", b"\x08")},
        "model: .*cannot be loaded",
    ),
    "a text encoder that is damaged": (
        lambda b: {"model": b.model_with("text_encoder/model.safetensors", b"\xff" * 64)},
        "model: .*cannot be loaded",
    ),
    "a model index that is no JSON": (
        lambda b: {"model": b.model_with("model_index.json", b"{")},
        "model: .*cannot be loaded",
    ),
    "a FLUX that is not Fill": (
        lambda b: {"model": b.model_without_mask_channels()},
        "model: .*128 input channels, got one with 32",
    ),
    "a model that does not exist": (
        lambda b: {"model": "nobody/nothing"},
        "model: nobody/nothing cannot be loaded",
    ),
    "no name of a model": (lambda b: {"model": "no/such/model"}, "model: no/such/model cannot be loaded"),
    "an unknown backend": (lambda b: {"backend": "fast"}, "backend: expected auto or one of cpu.*'fast'"),
    "an unusable backend": (lambda b: {"backend": "triton"}, "backend: 'triton' .*"),
    "an unknown dtype": (lambda b: {"dtype": "int8"}, "Invalid value for .*dtype"),
    "an unknown device": (lambda b: {"device": "abacus"}, "device: 'abacus' is not usable"),
    "a device without numbers": (lambda b: {"device": "meta"}, "device: 'meta' is not usable"),
    "offloading from the cpu to the cpu": (
        lambda b: {"offload": ..., "device": "cpu"},
        "offload: expected another device",
    ),
    "a negative weight": (lambda b: {"alpha_subject": -1.5}, r"alpha_subject: .*-1\.5"),
    "no number": (lambda b: {"alpha_prompt": "much"}, "Invalid value for .*alpha-prompt"),
    "not finite": (lambda b: {"gain_span": "nan"}, "gain_span: .*nan"),
    "a guidance that is no number": (lambda b: {"guidance": "nan"}, "Invalid value for .*guidance"),
    "a guidance without end": (lambda b: {"guidance": "inf"}, "guidance_scale: .*inf"),
    "a negative guidance": (lambda b: {"guidance": -1}, "Invalid value for .*guidance"),
    "an unknown norm": (lambda b: {"gain_norm": "cube"}, "Invalid value for .*gain-norm"),
    "no steps": (lambda b: {"steps": 0}, "Invalid value for .*steps"),
    "a negative seed": (lambda b: {"seed": -1}, "Invalid value for .*seed"),
    "a width off the grid": (lambda b: {"width": 33}, "width: .*multiple of 8.*33"),
    "a negative height": (lambda b: {"height": -16}, "height: .*-16"),
    "an output without a folder": (
        lambda b: {"output": b.folder / "no" / "out.png"},
        "output: no such folder",
    ),
    "a folder for an output": (lambda b: {"output": b.folder}, "output: expected a file"),
    "an output that is no picture": (lambda b: {"output": b.folder / "out.txt"}, "output: .*out.txt"),
    "a report that is no picture": (lambda b: {"report": b.folder / "report.docx"}, "report: .*report.docx"),
    "a report over the picture": (
        lambda b: {"report": b.folder / "out.png"},
        "report: expected another file than output",
    ),
    "an unknown option": (lambda b: {"colour": "red"}, "No such option.*--colour"),
}


@pytest.mark.parametrize("case", BAD)
def test_insert_refuses_bad_input(case: str, capsys, photos, checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    change, match = BAD[case]
    folder = tmp_path / "work"
    folder.mkdir()
    given = insert_arguments(photos, checkpoint, folder, **change(BadFiles(folder, photos, checkpoint)))
    refused(capsys, tmp_path, given, match)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["paint"], "No such command 'paint'"),
        (["insert"], "Missing option"),
        (["info", "cpu"], "unexpected extra argument"),
        (["sweep", "-o", "{folder}/file"], "output: expected a folder, got a file"),
        (["sweep", "-o", "{folder}/new", "--axis", "size=1"], "axis: expected one of alpha_prompt.*'size'"),
        (["sweep", "{folder}", "-o", "{folder}/new"], "folder: expected a list of items"),
        (["eval", "insert", "-o", "{folder}/file"], "output: expected a folder, got a file"),
        (["eval", "insert", "{folder}", "-o", "{folder}/new"], "folder: expected a list of items"),
        (["eval", "insert", "-o", "{folder}/new", "--model", "{folder}/none"], "model: no such folder"),
        (["demo", "--steps", "0"], "Invalid value for .*steps"),
        (["demo", "-o", "{folder}/file"], "output: expected a folder, got a file"),
        (["demo", "-o", "{folder}"], "output: .*holds other files"),
        (["demo", "-o", "{folder}/file/demo"], "Not a directory"),
        (["bench", "--shapes", "round"], "--shapes: unknown round"),
    ],
)
def test_other_commands_refuse_bad_input(arguments: list[str], match: str, capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(capsys, tmp_path, [a.format(folder=tmp_path) for a in arguments], match)


def test_process_exits_with_code_2_and_one_line(photos, tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "flashbrush",
        "insert",
        "--model",
        "x",
        "--prompt",
        "x",
        "-o",
        tmp_path / "out.png",
    ]
    files = ["--subject", photos["subject"], "--image", tmp_path / "none.png", "--mask", photos["mask"]]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"flashbrush: image: no such file: {tmp_path / 'none.png'}\n"


def test_out_of_memory_error_names_options_to_try(capsys, photos, checkpoint, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(InContextBrushPipeline, "__call__", fail)
    folder = tmp_path / "work"
    folder.mkdir()
    refused(capsys, tmp_path, insert_arguments(photos, checkpoint, folder), "memory is full: try --offload")


@pytest.mark.parametrize("command", ("insert", "inspect", "eval insert", "sweep"))
def test_a_missing_matplotlib_is_found_before_the_work(
    command: str, capsys, photos, checkpoint, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    given = command.split()
    if command in ("insert", "inspect"):
        given += insert_arguments(photos, checkpoint, tmp_path)[1:]
    given += {"insert": ["--report", tmp_path / "report.png"], "inspect": []}.get(
        command, ["-o", tmp_path / "tables"]
    )
    refused(capsys, tmp_path, given, "needs matplotlib")


def test_an_unexpected_error_is_raised(photos, checkpoint, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(InContextBrushPipeline, "__call__", fail)
    with pytest.raises(AssertionError, match="a bug"):
        cli.main([str(a) for a in insert_arguments(photos, checkpoint, tmp_path)])

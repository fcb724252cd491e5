"""flashbrush edit: the result, and options that a method does not use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("skimage")
from skimage import data

from ..command import flashbrush

SOURCE, EDIT = "a b c", "a d c"  # the tiny tokenizer's words are letters


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.chelsea()).resize((64, 64))


@pytest.fixture(scope="module")
def small_cat() -> Image.Image:
    return Image.fromarray(data.chelsea()).resize((64, 48))


@pytest.fixture(scope="module")
def cup() -> Image.Image:
    return Image.fromarray(data.coffee()).resize((64, 48))


def test_prompt_to_prompt_edits_and_refuses_unused_options(
    sd_checkpoint: Path, photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.save(tmp_path / "cat.png")
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    call = [
        "edit",
        "--method",
        "prompt-to-prompt",
        "--image",
        tmp_path / "cat.png",
        "--prompt",
        EDIT,
        "--model",
        sd_checkpoint,
        "--source-prompt",
        SOURCE,
        "--steps",
        3,
        "--dtype",
        "float32",
    ]
    code, said, err = flashbrush(capsys, *call, "-o", out, "--reconstruction", again)
    assert code == 0, err
    assert Image.open(out).size == Image.open(again).size == (64, 64) and "the picture is" in said
    code, _, err = flashbrush(capsys, *call, "-o", tmp_path / "none.png", "--word", "d")
    assert code == 2 and "together with --source-word" in err and not (tmp_path / "none.png").exists()
    code, _, err = flashbrush(
        capsys, *["magic" if a == "prompt-to-prompt" else a for a in call], "-o", tmp_path / "none.png"
    )
    assert code == 2 and "expected one of masactrl" in err
    code, _, err = flashbrush(capsys, *call, "--guidance", "nan", "-o", tmp_path / "none.png")
    assert code == 2 and "guidance: expected a finite number" in err
    for kind, given in (
        ("infedit", ["--inversion-iterations", 2]),
        ("plug-and-play", ["--word", "d", "--source-word", "b"]),
    ):
        mine = [
            kind if a == "prompt-to-prompt" else "none" if a == sd_checkpoint else a for a in call
        ]  # no model is loaded
        code, _, err = flashbrush(capsys, *mine, *given, "-o", tmp_path / "none.png")
        assert code == 2 and f"{given[0][2:].replace('-', '_')}: {kind} does not use it" in err, err


def test_warns_in_one_line_when_the_prompt_is_cut(
    sd_checkpoint: Path, photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.save(tmp_path / "cat.png")
    code, _, err = flashbrush(
        capsys,
        "edit",
        "--method",
        "masactrl",
        "--image",
        tmp_path / "cat.png",
        "--prompt",
        "a b c d " * 40,
        "--steps",
        5,
        "--model",
        sd_checkpoint,
        "--dtype",
        "float32",
        "-o",
        tmp_path / "out.png",
    )
    told = [line for line in err.splitlines() if "the text encoder reads" in line]
    assert (
        code == 0
        and len(told) == 1
        and told[0].startswith("flashbrush: the text encoder reads 8 of 1")
        and ".py" not in told[0]
    ), err


def test_kv_edit_edits_and_refuses_unused_options(
    flux_checkpoint: Path,
    cup: Image.Image,
    mask: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cup.save(tmp_path / "cup.png")
    mask.save(tmp_path / "mask.png")
    call = [
        "edit",
        "--method",
        "kv-edit",
        "--image",
        tmp_path / "cup.png",
        "--prompt",
        "a red moon",
        "--model",
        flux_checkpoint,
        "--width",
        64,
        "--height",
        48,
        "--steps",
        4,
        "--dtype",
        "float32",
    ]
    code, said, err = flashbrush(capsys, *call, "--mask", tmp_path / "mask.png", "-o", tmp_path / "out.png")
    assert code == 0, err
    assert Image.open(tmp_path / "out.png").size == (64, 48) and "9 of 48 image tokens" in said
    code, _, err = flashbrush(capsys, *call, "-o", tmp_path / "none.png")
    assert code == 2 and "mask: kv-edit needs one" in err and not (tmp_path / "none.png").exists()
    more = ["--mask", tmp_path / "mask.png", "--negative-prompt", "blue", "-o", tmp_path / "none.png"]
    code, _, err = flashbrush(capsys, *call, *more)
    assert code == 2 and "negative_prompt: kv-edit does not use it" in err


def test_personalize_anything_moves_the_subject_and_refuses_unused_options(
    flux_checkpoint: Path,
    small_cat: Image.Image,
    mask: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_cat.save(tmp_path / "cat.png")
    mask.save(tmp_path / "mask.png")
    call = [
        "edit",
        "--method",
        "personalize-anything",
        "--image",
        tmp_path / "cat.png",
        "--prompt",
        "a red moon",
        "--model",
        flux_checkpoint,
        "--mask",
        tmp_path / "mask.png",
        "--width",
        64,
        "--height",
        48,
        "--steps",
        2,
        "--dtype",
        "float32",
    ]
    pictures = []
    for name, more in (("here.png", []), ("there.png", ["--move", 16, 16])):
        code, _, err = flashbrush(capsys, *call, *more, "-o", tmp_path / name)
        assert code == 0, err
        pictures.append(Image.open(tmp_path / name).tobytes())
    assert pictures[0] != pictures[1]
    for wrong, said in (
        (["--word", "moon"], "word: personalize-anything does not use it"),
        (["--move", 8, 16], r"move: .* multiples of 16, got \(8, 16\)"),
        (["--height", 40], "height: expected a positive multiple of 16 pixels, got 40"),
    ):
        code, _, err = flashbrush(
            capsys, *call, "--model", "none", *wrong, "-o", tmp_path / "none.png"
        )  # before it is loaded
        assert code == 2 and re.search(said, err) and not (tmp_path / "none.png").exists(), err

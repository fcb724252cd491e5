"""PromptEditingPipeline and flashbrush edit, on a tiny Stable Diffusion and a real photo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from flashbrush.integrations import (
    InfEdit,
    LocalBlend,
    MasaCtrl,
    MutualBlend,
    PlugAndPlay,
    PromptEdit,
    PromptToPrompt,
    VisualInContext,
    WordMaps,
)
from flashbrush.integrations.pipelines import PromptEditingPipeline
from flashbrush.integrations.pipelines.prompt_editing import METHODS, _released

from ..command import flashbrush

SOURCE, EDIT = "a b c", "a d c"  # the tiny tokenizer knows letters
# The knobs that suit two resolutions of 8 x 8 and 4 x 4, and few steps.
KNOBS = {
    "masactrl": lambda: MasaCtrl(layers=(0, None), steps=(1, None)),
    "plug-and-play": lambda: PlugAndPlay(
        layers=(0, None), steps=(0, 3), feature=(0, 0), feature_steps=(0, 3)
    ),
    "prompt-to-prompt": lambda: PromptToPrompt(PromptEdit()),
    "infedit": lambda: InfEdit(PromptEdit()),
}


@pytest.fixture(scope="module")
def pipe(sd_checkpoint: Path) -> PromptEditingPipeline:
    return PromptEditingPipeline.from_pretrained(sd_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.chelsea()).resize((64, 64))


def edit(pipe: PromptEditingPipeline, photo: Image.Image, method, **more):
    options = {"source_prompt": SOURCE, "steps": 4, "seed": 0, "progress": False} | more
    return pipe(
        photo, more.pop("prompt", EDIT), method=method, **{n: v for n, v in options.items() if n != "prompt"}
    )


@torch.no_grad()
def encoded(pipe: PromptEditingPipeline, photo: Image.Image) -> Tensor:
    return pipe._encode(photo)


@pytest.mark.parametrize("kind", METHODS)
def test_an_edit(kind: str, pipe: PromptEditingPipeline, photo: Image.Image) -> None:
    method = KNOBS[kind]()
    first, again = (edit(pipe, photo, method) for _ in range(2))
    assert torch.equal(first.latents, again.latents) and first.image.size == photo.size
    assert type(first.method) is METHODS[kind][0]
    # The method matters, and so do prompt and guidance.
    other = edit(pipe, photo, method, prompt="z y x")
    strong = edit(pipe, photo, method, guidance_scale=12.0)
    idle = edit(pipe, photo, MasaCtrl(steps=(4, None)))
    for result in (other, strong, idle):
        assert float((result.latents - first.latents).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["masactrl", "plug-and-play", "prompt-to-prompt"])
def test_without_a_change_the_photo_comes_back(
    kind: str, pipe: PromptEditingPipeline, photo: Image.Image
) -> None:
    """Of inverted latents, with the same text and no guidance, to the error of the inversion."""
    result = edit(pipe, photo, KNOBS[kind](), prompt=SOURCE, guidance_scale=1.0, inversion_iterations=12)
    clean = encoded(pipe, photo)
    assert float((result.latents - clean).abs().max() / clean.abs().max()) < 1e-3


def test_infedit_without_a_change_is_the_photo(pipe: PromptEditingPipeline, photo: Image.Image) -> None:
    """Whatever the noise: it needs no inversion."""
    result = edit(pipe, photo, KNOBS["infedit"](), prompt=SOURCE, guidance_scale=1.0)
    clean = encoded(pipe, photo)
    assert float((result.latents - clean).abs().max() / clean.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["masactrl", "prompt-to-prompt", "infedit"])
def test_words_confine_the_edit(kind: str, pipe: PromptEditingPipeline, photo: Image.Image) -> None:
    plain = edit(pipe, photo, KNOBS[kind]())
    method = KNOBS[kind]()
    if kind == "masactrl":
        method.masks = WordMaps({-2: [2], -1: [2]}, resolution=8)
    elif kind == "prompt-to-prompt":
        method.blend = LocalBlend([[2], [2]], threshold=0.97, resolution=8)
    else:
        method.blend = MutualBlend([2], [2], 0.97, 0.97, resolution=8)
    confined = edit(pipe, photo, method)
    assert float((confined.latents - plain.latents).abs().max()) > 1e-4
    if kind == "prompt-to-prompt":
        # Outside of the mask the photo's latents stay.
        clean = encoded(pipe, photo)
        same = (confined.latents == clean).all(1)
        assert 0 < int(same.sum()) < same.numel()


def test_words_of_the_prompts_are_found(pipe: PromptEditingPipeline, photo: Image.Image) -> None:
    """The pipeline makes masks of words, of layers that a photo of this size has."""
    masa_ctrl = MasaCtrl(layers=(0, None), steps=(0, None))
    for given, size in (
        (masa_ctrl, {}),
        ("prompt-to-prompt", {"width": 72, "height": 48}),
        ("infedit", {"width": 72}),
    ):
        method = edit(pipe, photo, given, words=["d"], source_words=["b"], **size).method
        maps = method.masks if isinstance(method, MasaCtrl) else method.blend.maps  # type: ignore[union-attr]
        assert isinstance(maps, WordMaps) and maps.seen > 0
    with pytest.raises(ValueError, match="'q' is not in the prompt"):
        edit(pipe, photo, "masactrl", words=["q"], source_words=["b"])


def test_alignment_follows_the_prompts(pipe: PromptEditingPipeline, photo: Image.Image) -> None:
    replaced = edit(pipe, photo, "prompt-to-prompt").method
    refined = edit(pipe, photo, "prompt-to-prompt", prompt="a b d c").method
    assert isinstance(replaced, PromptToPrompt) and isinstance(refined, PromptToPrompt)
    same, more = replaced.edits[0].alignment, refined.edits[0].alignment
    assert same is not None and bool((same.alphas == 1).all())
    assert more is not None and int((more.alphas == 0).sum()) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "magic"}, "method: expected one of masactrl"),
        ({"method": VisualInContext()}, "method: expected one of masactrl"),
        ({"method": "plug-and-play", "words": ["d"], "source_words": ["b"]}, "Plug-and-Play has no use"),
        ({"method": "masactrl", "words": ["d"]}, "together with source_words"),
        ({"method": "masactrl", "guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
        ({"method": "masactrl", "steps": 0}, "steps: expected an integer from 1"),
        ({"method": "prompt-to-prompt", "prompt": "a b c d e f g h"}, "prompt: expected 1 to 8 tokens"),
        (
            {"method": "infedit", "inversion_iterations": 2},
            "inversion_iterations: expected 1, as InfEdit inverts nothing, got 2",
        ),
    ],
    ids=["a name", "a method", "words", "one's words", "guidance", "steps", "length", "iterations"],
)
def test_wrong_input(wrong: dict, said: str, pipe: PromptEditingPipeline, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match=said):
        edit(pipe, photo, **wrong)


@pytest.mark.parametrize("kind", ["prompt-to-prompt", "infedit"])
def test_a_method_that_was_used_is_of_its_prompts(
    kind: str, pipe: PromptEditingPipeline, photo: Image.Image
) -> None:
    used = edit(pipe, photo, kind)
    again = edit(pipe, photo, used.method)
    assert torch.equal(again.latents, used.latents)
    words = {"words": ["d"], "source_words": ["b"]}
    with_words = edit(pipe, photo, kind, **words)
    with pytest.raises(ValueError, match="words: expected none beside a method with masks or a blend"):
        edit(pipe, photo, with_words.method, **words)
    with pytest.raises(ValueError, match=r"method: expected an alignment of \('a b', 'd b'\), got one of"):
        edit(pipe, photo, used.method, prompt="d b", source_prompt="a b")


def test_the_command(
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
        assert code == 2 and f"{given[0][2:].replace('-', '_')}: {kind} has no use for it" in err, err


def test_a_prompt_that_is_cut_is_told_in_one_line(
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
    told = [line for line in err.splitlines() if "the text encoder sees" in line]
    assert code == 0 and len(told) == 1 and told[0].startswith("flashbrush: of 1") and ".py" not in told[0], (
        err
    )


@pytest.mark.parametrize("steps", (50, 20, 10))
def test_released_windows_are_shares_of_the_run(steps: int) -> None:
    masactrl, pnp = (_released(kind, steps) for kind in ("masactrl", "plug-and-play"))
    assert isinstance(masactrl, MasaCtrl) and isinstance(pnp, PlugAndPlay)
    assert masactrl.steps == {50: (4, None), 20: (2, None), 10: (1, None)}[steps]
    assert pnp.steps == {50: (0, 26), 20: (0, 10), 10: (0, 5)}[steps]
    assert pnp.feature_steps == {50: (0, 41), 20: (0, 16), 10: (0, 8)}[steps]

"""KVEditPipeline and flashbrush edit --method kv-edit, on a tiny FLUX with the text encoders of the tiny
model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from flashbrush.integrations import KVEditPipeline
from flashbrush.integrations.diffusers import apply

from ..command import flashbrush


@pytest.fixture(scope="module")
def pipe(flux_checkpoint: Path) -> KVEditPipeline:
    return KVEditPipeline.from_pretrained(flux_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.coffee()).resize((64, 48))


OPTIONS = {
    "source_prompt": "a photo of a cup",
    "steps": 4,
    "skip": 1,
    "progress": False,
    "width": 64,
    "height": 48,
}


def test_the_background_stays(pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image) -> None:
    result, again = (pipe(photo, mask, "a red moon", **OPTIONS) for _ in range(2))
    assert torch.equal(result.latents, again.latents) and result.image.size == photo.size
    # 8 x 8 pixels a token: columns 2 to 4, rows 1 to 3.
    assert result.tokens.tolist() == [8 * row + column for row in (1, 2, 3) for column in (2, 3, 4)]
    clean = pipe._encode(photo)[0].detach()
    others = torch.ones(clean.shape[1], dtype=torch.bool)
    others[result.tokens] = False
    assert torch.equal(result.latents[:, others], clean[:, others])
    assert float((result.latents[:, ~others] - clean[:, ~others]).abs().max()) > 0.05
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(result.image)[outside], np.asarray(photo)[outside])
    assert not np.array_equal(np.asarray(result.image)[~outside], np.asarray(photo)[~outside])


def test_an_edit_computes_the_masked_tokens_alone(
    pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    seen: list[int] = []
    hook = pipe.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    try:
        pipe(photo, mask, "a red moon", **OPTIONS)
    finally:
        hook.remove()
    assert seen == [48] * 3 + [9] * 3


def test_again_is_an_edit_of_the_same_inversion(
    pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    other = Image.fromarray(np.roll(np.asarray(mask), 16, 1))
    expected = [
        pipe(photo, mask, "a green star", **OPTIONS),
        pipe(photo, other, "a red moon", **OPTIONS, attn_scale=3.0, guidance_scale=2.0),
        pipe(photo, mask, "a red moon", **OPTIONS, paste_back=False),
    ]
    first = pipe(photo, mask, "a red moon", **OPTIONS)
    seen: list[int] = []
    hook = pipe.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    try:
        made = [
            pipe.again(first, "a green star", progress=False),
            pipe.again(first, "a red moon", mask=other, attn_scale=3.0, guidance_scale=2.0, progress=False),
            pipe.again(first, "a red moon", paste_back=False, progress=False),  # with the first one's mask
        ]
    finally:
        hook.remove()
    assert seen == [9] * 9
    for one, again in zip(expected, made, strict=True):
        assert torch.equal(one.latents, again.latents) and torch.equal(one.tokens, again.tokens)
        assert one.image.tobytes() == again.image.tobytes()


def test_again_refuses(pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image) -> None:
    done = pipe(photo, mask, "a red moon", **OPTIONS, masked_inversion=True)
    other = Image.fromarray(np.roll(np.asarray(mask), 16, 1))
    with pytest.raises(ValueError, match="mask: what is kept was inverted with another mask"):
        pipe.again(done, "a star", mask=other, progress=False)
    with pytest.raises(TypeError, match="done: expected a KVEditOutput, got Image"):
        pipe.again(done.image, "a star")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guidance_scale"):
        pipe.again(done, "a star", guidance_scale=float("nan"))
    done.method.kept.clear()
    with pytest.raises(ValueError, match="phase: nothing is kept for time"):
        pipe.again(done, "a star", progress=False)


def test_the_same_prompt_brings_the_photo_back(
    pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    """To the error of Euler's steps, which more of them make smaller."""
    clean = pipe._encode(photo)[0].detach()
    errors = []
    for steps in (8, 64):
        options = OPTIONS | {"steps": steps, "skip": steps // 2, "attn_scale": 0.0}
        options |= {"guidance_scale": 1.5, "inversion_guidance": 1.5}
        result = pipe(photo, mask, OPTIONS["source_prompt"], **options)
        errors.append(float((result.latents - clean).abs().max() / clean.abs().max()))
    assert errors[1] < 0.4 * errors[0]


CHANGES = [
    {"prompt": "a green star"},
    {"source_prompt": "a moon"},
    {"attn_scale": 3.0},
    {"skip": 2},
    {"masked_inversion": True},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_is_asked_for_matters(
    change: dict, pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    plain = pipe(photo, mask, "a red moon", **OPTIONS)
    prompt = change.get("prompt", "a red moon")
    changed = pipe(photo, mask, prompt, **OPTIONS | {n: v for n, v in change.items() if n != "prompt"})
    assert float((plain.latents - changed.latents).abs().max()) > 1e-4


def test_the_model_is_left_as_it_was(pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image) -> None:
    before = list(pipe.pipe.transformer.attn_processors.values())
    pipe(photo, mask, "a red moon", **OPTIONS)
    assert all(a is b for a, b in zip(before, pipe.pipe.transformer.attn_processors.values(), strict=True))
    with apply(pipe.pipe.transformer):  # nobody else's control is in place
        pass


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"skip": 4}, "skip: expected an integer from 0 to 3"),
        ({"guidance_scale": float("inf")}, "guidance_scale: expected a finite number"),
        ({"width": 60}, "width"),
        ({"mask": Image.new("L", (64, 48), 0)}, "mask"),
    ],
    ids=["steps", "skip", "guidance", "width", "mask"],
)
def test_wrong_input(
    wrong: dict, said: str, pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    options = OPTIONS | {n: v for n, v in wrong.items() if n != "mask"}
    with pytest.raises(ValueError, match=said):
        pipe(photo, wrong.get("mask", mask), "a red moon", **options)


def test_another_pipeline_is_refused(checkpoint: Path) -> None:
    with pytest.raises(TypeError, match="expected a FluxPipeline, got str"):
        KVEditPipeline("FLUX")
    with pytest.raises(ValueError, match="is not a FLUX checkpoint"):
        KVEditPipeline.from_pretrained(checkpoint / "vae")


def test_the_command(
    flux_checkpoint: Path,
    photo: Image.Image,
    mask: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photo.save(tmp_path / "cup.png")
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
    assert code == 2 and "negative_prompt: kv-edit has no use for it" in err

"""KVEditPipeline on a tiny random FLUX with the text encoders of the tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from flashbrush.integrations import KVEditPipeline
from flashbrush.integrations.diffusers import apply


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


def test_the_background_is_bitwise_the_photo_s(
    pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image
) -> None:
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


def test_an_edit_computes_only_the_masked_tokens(
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


def test_again_equals_a_call_of_its_own(pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image) -> None:
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
            pipe.again(first, "a red moon", paste_back=False, progress=False),  # the first mask again
        ]
    finally:
        hook.remove()
    assert seen == [9] * 9
    for one, again in zip(expected, made, strict=True):
        assert torch.equal(one.latents, again.latents) and torch.equal(one.tokens, again.tokens)
        assert one.image.tobytes() == again.image.tobytes()


def test_wrong_input_of_again_raises(pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image) -> None:
    done = pipe(photo, mask, "a red moon", **OPTIONS, masked_inversion=True)
    other = Image.fromarray(np.roll(np.asarray(mask), 16, 1))
    with pytest.raises(ValueError, match="mask: the kept keys are of another mask"):
        pipe.again(done, "a star", mask=other, progress=False)
    with pytest.raises(TypeError, match="done: expected a KVEditOutput, got Image"):
        pipe.again(done.image, "a star")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guidance_scale"):
        pipe.again(done, "a star", guidance_scale=float("nan"))
    done.method.kept.clear()
    with pytest.raises(ValueError, match="phase: nothing is kept for time"):
        pipe.again(done, "a star", progress=False)


def test_an_unchanged_prompt_gives_the_photo_back(
    pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    """To the error of the Euler steps, which shrinks with their number."""
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
def test_every_option_changes_the_result(
    change: dict, pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    plain = pipe(photo, mask, "a red moon", **OPTIONS)
    prompt = change.get("prompt", "a red moon")
    changed = pipe(photo, mask, prompt, **OPTIONS | {n: v for n, v in change.items() if n != "prompt"})
    assert float((plain.latents - changed.latents).abs().max()) > 1e-4


def test_the_model_s_processors_are_restored(
    pipe: KVEditPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    before = list(pipe.pipe.transformer.attn_processors.values())
    pipe(photo, mask, "a red moon", **OPTIONS)
    assert all(a is b for a, b in zip(before, pipe.pipe.transformer.attn_processors.values(), strict=True))
    with apply(pipe.pipe.transformer):  # raises if a control is still in place
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
def test_wrong_input_raises(
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

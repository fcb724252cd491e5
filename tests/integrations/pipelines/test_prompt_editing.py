"""PromptEditingPipeline on a tiny Stable Diffusion and a real photo."""

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

SOURCE, EDIT = "a b c", "a d c"  # the tiny tokenizer's words are letters
# Knobs for a UNet of two resolutions, 8 x 8 and 4 x 4, and for few steps.
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
def test_an_edit_follows_method_prompt_and_guidance(
    kind: str, pipe: PromptEditingPipeline, photo: Image.Image
) -> None:
    method = KNOBS[kind]()
    first, again = (edit(pipe, photo, method) for _ in range(2))
    assert torch.equal(first.latents, again.latents) and first.image.size == photo.size
    assert type(first.method) is METHODS[kind][0]
    other = edit(pipe, photo, method, prompt="z y x")
    strong = edit(pipe, photo, method, guidance_scale=12.0)
    idle = edit(pipe, photo, MasaCtrl(steps=(4, None)))
    for result in (other, strong, idle):
        assert float((result.latents - first.latents).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["masactrl", "plug-and-play", "prompt-to-prompt"])
def test_an_unchanged_prompt_gives_the_photo_back(
    kind: str, pipe: PromptEditingPipeline, photo: Image.Image
) -> None:
    """Without guidance, to the error of the inversion."""
    result = edit(pipe, photo, KNOBS[kind](), prompt=SOURCE, guidance_scale=1.0, inversion_iterations=12)
    clean = encoded(pipe, photo)
    assert float((result.latents - clean).abs().max() / clean.abs().max()) < 1e-3


def test_infedit_with_an_unchanged_prompt_gives_the_photo_back(
    pipe: PromptEditingPipeline, photo: Image.Image
) -> None:
    """Exactly, as it inverts nothing."""
    result = edit(pipe, photo, KNOBS["infedit"](), prompt=SOURCE, guidance_scale=1.0)
    clean = encoded(pipe, photo)
    assert float((result.latents - clean).abs().max() / clean.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["masactrl", "prompt-to-prompt", "infedit"])
def test_a_blend_or_masks_confine_the_edit(
    kind: str, pipe: PromptEditingPipeline, photo: Image.Image
) -> None:
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
        # Outside of the blend's mask the latents are the photo's.
        clean = encoded(pipe, photo)
        same = (confined.latents == clean).all(1)
        assert 0 < int(same.sum()) < same.numel()


def test_words_become_masks_or_a_blend(pipe: PromptEditingPipeline, photo: Image.Image) -> None:
    """With the layers that exist at the photo's size."""
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
        ({"method": "plug-and-play", "words": ["d"], "source_words": ["b"]}, "Plug-and-Play does not use"),
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
def test_wrong_input_raises(wrong: dict, said: str, pipe: PromptEditingPipeline, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match=said):
        edit(pipe, photo, **wrong)


@pytest.mark.parametrize("kind", ["prompt-to-prompt", "infedit"])
def test_a_used_method_is_bound_to_its_prompts(
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


@pytest.mark.parametrize("steps", (50, 20, 10))
def test_released_windows_are_in_proportion_to_the_steps(steps: int) -> None:
    masactrl, pnp = (_released(kind, steps) for kind in ("masactrl", "plug-and-play"))
    assert isinstance(masactrl, MasaCtrl) and isinstance(pnp, PlugAndPlay)
    assert masactrl.steps == {50: (4, None), 20: (2, None), 10: (1, None)}[steps]
    assert pnp.steps == {50: (0, 26), 20: (0, 10), 10: (0, 5)}[steps]
    assert pnp.feature_steps == {50: (0, 41), 20: (0, 16), 10: (0, 8)}[steps]

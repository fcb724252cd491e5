"""AppearanceTransferPipeline on a tiny checkpoint, against an eager run of the released code's steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from flashbrush.integrations import AppearanceTransferPipeline, CrossImageAttention, TransferRoles
from flashbrush.integrations.pipelines.appearance_transfer import linear_fall
from flashbrush.integrations.pipelines.inversion.ddpm import DDPMSchedule, Inversion, noise_predictor, sample

from ..tiny_sd import ddim

STEPS, SKIP, ADAIN_FROM = 9, 2, 4
TEXT = "a photo"
SIZE = (64, 48)


def photo(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


LOOK, SHAPE = photo(0), photo(1)


@pytest.fixture(scope="module")
def pipe(sd_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> AppearanceTransferPipeline:
    folder = tmp_path_factory.mktemp("transfer")
    return AppearanceTransferPipeline.from_pretrained(sd_checkpoint, dtype=torch.float32, cache=folder)


def method() -> CrossImageAttention:
    """A window per resolution of the tiny UNet; every second step before step 3 reads the structure."""
    return CrossImageAttention(
        windows={(6, 8): (1, 5), (3, 4): (0, None)}, structure_every=2, structure_until=3
    )


def run(pipe: AppearanceTransferPipeline, look: Any = LOOK, shape: Any = SHAPE, **more: Any):
    options = {
        "text": TEXT,
        "steps": STEPS,
        "skip": SKIP,
        "seed": 0,
        "progress": False,
        "method": method(),
        "adain_from": ADAIN_FROM,
        **more,
    }
    return pipe(look, shape, **options)


class Eager(AttnProcessor2_0):
    """Stock attention; item 3 reads another item's keys and values with its own queries, its map in full."""

    source: int | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stock = super().__call__(attn, hidden_states, *args, **kwargs)
        if self.source is not None:
            made = (linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v))
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in made)
            prob = (q[3] @ k[self.source].mT / math.sqrt(q.shape[-1])).softmax(-1)
            prob = (1.67 * prob - 0.67 / prob.shape[-1]).clamp(0, 1)
            stock[3] = attn.to_out[0]((prob @ v[self.source]).transpose(0, 1).flatten(1))
        return stock


@torch.no_grad()
def inverted(pipe: AppearanceTransferPipeline, guidance: float) -> Inversion:
    """The inversions that the pipeline has cached, checked by sampling from them."""
    unet, kept = pipe.pipe.unet, {}
    for path in pipe.cache.folder.iterdir():
        file = load_file(path)
        for i, picture in enumerate((LOOK, SHAPE)):
            if torch.equal(file["latents"][0, -1], pipe._encode(picture)[0]):
                kept[i] = file
    latents = torch.cat([kept[i]["latents"] for i in (0, 1)])
    maps = torch.cat([kept[i]["noise_maps"] for i in (0, 1)])
    schedule = DDPMSchedule.from_scheduler(ddim(), STEPS)
    predict = noise_predictor(unet, pipe._embed(TEXT), pipe._embed(""), guidance)
    found = Inversion(latents, maps, SKIP)
    torch.testing.assert_close(
        sample(found, predict, schedule)[:, :-1], latents[:, :-1], rtol=1e-4, atol=1e-4
    )
    return found


@torch.no_grad()
def test_equals_an_eager_run(pipe) -> None:
    result = run(pipe)
    known = inverted(pipe, 3.5)
    unet, scheduler = pipe.pipe.unet, ddim()
    scheduler.set_timesteps(STEPS)
    text = pipe.pipe.encode_prompt(TEXT, "cpu", 1, False)[0]
    stock = unet.attn_processors
    mine = {name: Eager() if name.startswith("up") and "attn1" in name else p for name, p in stock.items()}
    latents, count = known.latents[1:, 0], STEPS - SKIP
    for i, t in enumerate(scheduler.timesteps[SKIP:]):
        lagging = i - 1
        for name, processor in mine.items():
            if isinstance(processor, Eager):
                # The tiny UNet's attention on the way up is all at the latents' own resolution.
                assert name.startswith("up_blocks.1")
                inside = 1 <= lagging < 5
                processor.source = None if not inside else 1 if lagging < 3 and lagging % 2 == 0 else 0
        batch = torch.cat([known.latents[:, i], latents, latents])
        unet.set_attn_processor(dict(mine))
        out = unet(batch, t, text.expand(4, -1, -1)).sample
        eps = out[2:3] + (3.5 + (1.75 - 3.5) * i / (count - 1)) * (out[3:] - out[2:3])
        latents = scheduler.step(
            eps, int(t), latents, eta=1.0, variance_noise=known.noise_maps[1:, i]
        ).prev_sample
        if i >= ADAIN_FROM:
            style = known.latents[:1, i + 1]
            var, mean = torch.var_mean(latents, (2, 3), keepdim=True)
            style_var, style_mean = torch.var_mean(style, (2, 3), keepdim=True)
            latents = (latents - mean) / (var + 1e-5).sqrt() * (style_var + 1e-5).sqrt() + style_mean
    unet.set_attn_processor(stock)
    torch.testing.assert_close(result.latents, latents, rtol=1e-4, atol=1e-4)
    for change in (
        {"gamma": 0.0},
        {"adain_from": None},
        {"method": CrossImageAttention(windows={2: (0, None)})},
    ):
        assert float((run(pipe, **change).latents - latents).abs().max()) > 1e-2, change


def test_scales_fall_linearly() -> None:
    assert [linear_fall(3.5, i, 3) for i in range(3)] == [3.5, 2.625, 1.75]
    assert [linear_fall(1.5, i, 3) for i in range(3)] == [1.5, 1.25, 1.0]
    assert linear_fall(3.5, 0, 1) == 3.5


def test_released_windows_follow_the_latents_size_and_the_steps(pipe) -> None:
    """In the code: 32 of 100 levels skipped; 64 x 64 tokens in steps 10 to 90, 32 x 32 in 10 to 70."""
    released = run(pipe, steps=20, skip=None, adain_from="auto", method=None)
    knobs = CrossImageAttention(windows={(6, 8): (2, 18), (3, 4): (2, 14)}, structure_until=8)
    given = {"steps": 20, "skip": 6, "adain_from": 4, "method": knobs}
    assert torch.equal(released.latents, run(pipe, **given).latents)
    for change in (
        {"skip": 5},
        {"adain_from": 5},
        {"method": replace(knobs, structure_until=2)},
        {"method": replace(knobs, windows={(6, 8): (3, 18)})},
    ):
        assert float((run(pipe, **given | change).latents - released.latents).abs().max()) > 1e-3, change


def test_second_run_reads_inversions_of_the_same_size_from_the_cache(pipe) -> None:
    first = run(pipe, photo(0, (80, 80)), photo(2, (100, 75)), width=48)
    assert first.size == (48, 32) and first.image.size == (100, 75) and first.latents.shape == (1, 4, 4, 6)
    assert first.seed == 0 and first.reused == 0
    again = run(pipe, photo(0, (80, 80)), photo(2, (100, 75)), width=48)
    assert (
        again.reused == 2
        and torch.equal(again.latents, first.latents)
        and again.image.tobytes() == first.image.tobytes()
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"look": "none.png"}, FileNotFoundError, "appearance: no such file"),
        ({"shape": 3}, TypeError, "structure: .*int"),
        ({"adain_from": -1}, ValueError, "adain_from: .*-1"),
        ({"adain_from": "late"}, ValueError, "adain_from: .*'auto' or None, got 'late'"),
        ({"method": "swap"}, TypeError, "method: expected a CrossImageAttention, got str"),
        ({"gamma": None}, TypeError, "gamma: .*None"),
        ({"skip": STEPS}, ValueError, "skip: .*got 9"),
    ],
)
def test_wrong_input_raises(pipe, change: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        run(pipe, **change)


def test_the_caller_s_method_is_not_changed(pipe) -> None:
    mine = method()
    run(pipe, method=mine)
    assert mine.items == (TransferRoles(),)

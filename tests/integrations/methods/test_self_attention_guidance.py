"""SAG against an eager implementation of its formula, and against diffusers' pipeline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from flashbrush.integrations import SelfAttentionGuidance
from flashbrush.integrations.diffusers import apply
from flashbrush.integrations.methods.self_attention_guidance import degrade, guide

from ..diffusers.tiny_images import SDXL, sd3_call, tiny_sd3, tiny_unet, unet_call
from ..tiny import relative
from .eager import LargestTensor, Site, attend, descend, run, run_eagerly

TOLERANCE = 1e-5  # float32, relative to the largest output
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


class EagerSAG:
    """Plain attention that keeps one layer's map, (batch, heads, tokens, tokens)."""

    def __init__(self, name: str = MID) -> None:
        self.name = name

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.name == self.name:
            self.map = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        return attend(q, k, v)

    @property
    def mass(self) -> Tensor:
        return self.map.mean(1).sum(1)


def blur(x: Tensor) -> Tensor:
    line = torch.exp(-0.5 * torch.arange(-4.0, 5.0) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    return F.conv2d(
        F.pad(x, (4, 4, 4, 4), mode="reflect"), kernel.expand(x.shape[1], 1, 9, 9), groups=x.shape[1]
    )


def unet(config: dict | None = None, **call) -> tuple[Any, dict]:
    model = tiny_unet() if config is None else tiny_unet(config)
    return model, unet_call(model, **call)


@pytest.mark.parametrize(
    ("config", "side", "grid", "name", "layer"),
    [
        (None, (8, 8), (4, 4), MID, None),
        (None, (6, 12), (3, 6), MID, None),
        (SDXL, (8, 8), (4, 4), MID, None),
        (None, (8, 8), (8, 8), "down_blocks.0.attentions.0.transformer_blocks.0.attn1", 0),
    ],
)
def test_mass_and_mask_match_eager(config, side, grid, name: str, layer) -> None:
    model, call = unet(config, side=side)
    core = EagerSAG(name)
    expected = run_eagerly(model, call, core)
    method = SelfAttentionGuidance(layer=layer)
    with apply(model, method):
        out = run(model, call)
    assert relative(out, expected) <= TOLERANCE  # the attention is plain
    assert method.mass is not None and relative(method.mass, core.mass) <= TOLERANCE
    mask = method.mask(*side)
    chosen = core.mass > 1.0
    assert 0 < int(chosen.sum()) < chosen.numel()
    assert torch.equal(mask, F.interpolate(chosen.float().reshape(-1, 1, *grid), side))


def test_mask_and_degradation_match_diffusers() -> None:
    pytest.importorskip("diffusers.pipelines.deprecated.stable_diffusion_sag")
    from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import (
        StableDiffusionSAGPipeline,
    )

    model, call = unet()
    core, scheduler, t = EagerSAG(), DDIMScheduler(), torch.tensor(300)
    noise = run_eagerly(model, call, core)
    alpha = scheduler.alphas_cumprod[t]
    clean = (call["sample"] - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    pipe: Any = SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(attention_head_dim=4)), scheduler=scheduler
    )
    expected = StableDiffusionSAGPipeline.sag_masking(pipe, clean, core.map.flatten(0, 1), (4, 4), t, noise)
    method = SelfAttentionGuidance()
    with apply(model, method):
        mine = degrade(call["sample"], run(model, call), method.mask(8, 8), alpha)
    assert relative(mine, expected) <= TOLERANCE < 1e-3 < relative(mine, call["sample"])


@pytest.mark.parametrize("free", [False, True], ids=["plain", "classifier-free guidance"])
def test_run_matches_eager(free: bool) -> None:
    model, call = unet()
    call["encoder_hidden_states"][0] = 0
    first = {**call, "encoder_hidden_states": call["encoder_hidden_states"][:1]}
    alphas, method, core = (0.3, 0.5, 0.8), SelfAttentionGuidance(), EagerSAG()

    def mine(x: Tensor, i: int) -> Tensor:
        noise = run(model, (call | {"sample": x.expand(2, -1, -1, -1)}) if free else (first | {"sample": x}))
        worse = degrade(x, noise[:1], method.mask(8, 8)[:1], alphas[i])
        worse = run(model, first | {"sample": worse})
        return guide(noise[:1], worse, noise[1:] if free else None, guidance=3.0)

    def theirs(x: Tensor, i: int) -> Tensor:
        noise = run_eagerly(
            model, (call | {"sample": x.expand(2, -1, -1, -1)}) if free else (first | {"sample": x}), core
        )
        u, a = noise[:1], alphas[i]
        mask = F.interpolate((core.mass[:1] > 1).float().reshape(1, 1, 4, 4), (8, 8))
        clean = (x - (1 - a) ** 0.5 * u) / a**0.5
        again = a**0.5 * torch.where(mask > 0, blur(clean), clean) + (1 - a) ** 0.5 * u
        worse = run_eagerly(model, first | {"sample": again}, core)
        return (u + 3 * (noise[1:] - u) if free else u) + 0.75 * (u - worse)

    with apply(model, method):
        result = descend(mine, call["sample"][:1])
    assert relative(result, descend(theirs, call["sample"][:1])) <= TOLERANCE


def test_empty_mask_degrades_nothing_and_each_knob_has_an_effect() -> None:
    model, call = unet()
    method = SelfAttentionGuidance(threshold=1e9)
    with apply(model, method):
        noise = run(model, call)
    assert (
        not method.mask(8, 8).any()
        and relative(degrade(call["sample"], noise, method.mask(8, 8), 0.5), call["sample"]) < 1e-6
    )
    method.threshold = 1.0
    some = method.mask(8, 8)
    method.threshold = 0.0
    assert 0 < int(some.sum()) < int(method.mask(8, 8).sum())
    everything = torch.ones(1, 1, 8, 8)
    blurs = [
        degrade(call["sample"], noise, everything, 0.5, **more) for more in ({}, {"sigma": 2.0}, {"taps": 3})
    ]
    assert all(relative(a, b) > 1e-3 for a, b in ((blurs[0], blurs[1]), (blurs[0], blurs[2])))
    u, c, d = torch.randn(3, 1, 4, 8, 8).unbind()
    assert torch.equal(guide(u, d, scale=0.5), u + 0.5 * (u - d)) and torch.equal(guide(u, u, c), u + (c - u))


def test_makes_no_attention_map() -> None:
    model, call = unet(batch=1, side=(64, 64))
    with apply(model, SelfAttentionGuidance(layer=0)), LargestTensor() as largest:
        run(model, call)
    assert largest.elements < 4096**2


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"threshold": -1}, "^threshold: "),
        ({"threshold": float("nan")}, "^threshold: "),
        ({"threshold": "1"}, "^threshold: "),
        ({"layer": -1}, "^layer: "),
        ({"layer": 1.0}, "^layer: "),
    ],
    ids=str,
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SelfAttentionGuidance(**knob)


def test_layer_that_cannot_be_read_raises() -> None:
    model, call = unet()
    method = SelfAttentionGuidance(layer=1)
    with apply(model, method), pytest.raises(ValueError, match="layer 1 is 'cross'"):
        run(model, call)
    sd3, method = tiny_sd3(), SelfAttentionGuidance()
    with apply(sd3, method):
        run(sd3, sd3_call())
    with pytest.raises(RuntimeError, match="no layer was read"):
        method.mask(8, 8)

"""SEG against an eager implementation of its formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import SmoothedEnergy
from flashbrush.integrations.diffusers import Layer, Step, apply
from flashbrush.integrations.methods.shared.perturbed_guidance import guide

from ..diffusers.tiny_images import sd3_call, tiny_sd3, tiny_unet, unet_call
from ..tiny import COLUMNS, ROWS, relative, tiny_call, tiny_flux
from .eager import (
    LargestTensor,
    Site,
    attend,
    changed_layers,
    descend,
    run,
    run_eagerly,
    worst_layer,
)

TOLERANCE = 1e-5  # float32, relative to the largest output
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
UP = "up_blocks.1.attentions.1.transformer_blocks.0.attn1"


def blurred(q: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    """q (batch, heads, tokens, dim) of the image"""
    if sigma > 9999:
        return q.mean(2, keepdim=True).expand_as(q)
    image = q.transpose(2, 3).unflatten(3, grid).flatten(0, 1)  # (batch * heads, dim, rows, columns)
    for axis in (0, 1):
        side, wanted = grid[axis], math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
        reach = min(wanted, side if side % 2 else side - 1) // 2
        taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
        kernel = (
            (taps / taps.sum())
            .reshape((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1))
            .repeat(image.shape[1], 1, 1, 1)
        )
        padding = (0, 0, reach, reach) if axis == 0 else (reach, reach, 0, 0)
        image = F.conv2d(F.pad(image, padding, mode="reflect"), kernel, groups=image.shape[1])
    return image.unflatten(0, q.shape[:2]).flatten(3).transpose(2, 3)


class EagerSEG:
    def __init__(
        self, names: tuple[str, ...], items: tuple[int, ...], grid: tuple[int, int], sigma: float
    ) -> None:
        self.names, self.items, self.grid, self.sigma = names, list(items), grid, sigma

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.name in self.names:
            q = q.clone()
            q[self.items, :, site.text_len :] = blurred(
                q[self.items, :, site.text_len :], self.grid, self.sigma
            )
        return attend(q, k, v)


def unet(batch: int = 3, side: tuple[int, int] = (8, 8)) -> tuple[Any, dict]:
    model = tiny_unet()
    return model, unet_call(model, batch=batch, side=side)


def sd3(batch: int = 3) -> tuple[Any, dict]:
    return tiny_sd3(), sd3_call(batch=batch)


def flux(batch: int = 3) -> tuple[Any, dict]:
    model = tiny_flux()
    return model, tiny_call(model, batch=batch)


JOINT = ("transformer_blocks.1.attn",)
CASES = {
    "infinite": (unet, {}, (MID,), (4, 4)),
    "beyond 9999": (unet, {"sigma": 9999999.0}, (MID,), (4, 4)),
    "finite": (unet, {"sigma": 0.4}, (MID,), (4, 4)),
    "wider than the grid": (unet, {"sigma": 10}, (MID,), (4, 4)),
    "other layers": (unet, {"sigma": 1.0, "layers": (12,)}, (UP,), (8, 8)),
    "oblong": (lambda: unet(side=(6, 12)), {"sigma": 0.6}, (MID,), (3, 6)),
    "SD 3": (sd3, {"sigma": 0.5}, JOINT, (4, 4)),
    "SD 3, infinite": (sd3, {}, JOINT, (4, 4)),
    "FLUX": (
        flux,
        {"sigma": 0.8, "layers": (1, "single")},
        (*JOINT, "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"),
        (ROWS, COLUMNS),
    ),
    "FLUX, infinite": (flux, {}, JOINT, (ROWS, COLUMNS)),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_eager(case: str) -> None:
    host, knobs, names, grid = CASES[case]
    model, call = host()
    core = EagerSEG(names, (2,), grid, knobs.get("sigma", math.inf))
    expected = run_eagerly(model, call, core)
    with apply(model, SmoothedEnergy(**knobs)) as handle:
        handle.grid = grid
        assert worst_layer(model, call, core) <= TOLERANCE
        assert relative(run(model, call), expected) <= TOLERANCE
        assert set(changed_layers(model, call)) == set(names)
    plain = run(model, call)
    assert relative(expected[:2], plain[:2]) <= TOLERANCE < 1e-3 < relative(expected, plain)


@pytest.mark.parametrize("sigma", [0.7, math.inf])
@pytest.mark.parametrize("host", [unet, sd3])
def test_run_matches_eager(host, sigma: float) -> None:
    model, call = host()
    key = "sample" if "sample" in call else "hidden_states"
    core = EagerSEG((MID, *JOINT), (2,), (4, 4), sigma)

    def mine(x: Tensor, i: int) -> Tensor:
        u, c, p = run(model, call | {key: x.expand(3, -1, -1, -1)}).split(1)
        return guide(p, c, u, scale=1.0, guidance=1.5)

    def theirs(x: Tensor, i: int) -> Tensor:
        u, c, p = run_eagerly(model, call | {key: x.expand(3, -1, -1, -1)}, core).split(1)
        return c + 0.5 * (c - u) + (c - p)

    with apply(model, SmoothedEnergy(sigma=sigma)):
        result = descend(mine, call[key][:1])
    assert relative(result, descend(theirs, call[key][:1])) <= TOLERANCE


def test_infinite_sigma_computes_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def spy(q, k, v, control=None, **options):
        rows.append(q.shape[0] * q.shape[1])
        return fb.attention(q, k, v, control, **options)

    monkeypatch.setattr("flashbrush.integrations.diffusers.protocol.plan_call.attention", spy)
    model, call = unet()
    for sigma, counts in ((math.inf, [2 * 16, 1]), (1.0, [2 * 16, 16])):
        with apply(model, SmoothedEnergy(sigma=sigma)):
            rows.clear()
            run(model, call)
            assert rows == counts  # of the one controlled layer: the other items, and the perturbed one


def test_makes_no_attention_map() -> None:
    """At 4,096 tokens and one head; the eager form shows that a map would be seen."""
    model = tiny_unet(attention_head_dim=1)
    call = unet_call(model, batch=3, side=(64, 64))
    for sigma in (0.5, math.inf):
        with apply(model, SmoothedEnergy(sigma=sigma, layers=(12,))), LargestTensor() as largest:
            run(model, call)
        assert largest.elements < 4096**2
    with LargestTensor() as largest:
        attend(torch.ones(1, 1, 4096, 8), torch.ones(1, 1, 4096, 8), torch.ones(1, 1, 4096, 8))
    assert largest.elements == 4096**2


@pytest.mark.parametrize(
    "change",
    [{"sigma": 1.0}, {"layers": "up"}, {"items": (0,)}, {"guided": False}, {"steps": (1, None)}],
    ids=str,
)
def test_each_knob_changes_the_output(change: dict) -> None:
    model, call = unet(6)
    method = SmoothedEnergy()
    with apply(model, method) as handle:
        handle.set_step(0)
        before = run(model, call)
        handle.method = dataclasses.replace(method, **change)
        assert relative(run(model, call), before) > 1e-4


def test_zero_sigma_is_plain_attention() -> None:
    model, call = unet()
    plain = run(model, call)
    with apply(model, SmoothedEnergy(sigma=0)):
        assert relative(run(model, call), plain) <= TOLERANCE


@pytest.mark.parametrize("sigma", [-1, math.nan, "wide", True], ids=str)
def test_wrong_knob_raises(sigma) -> None:
    with pytest.raises(ValueError, match=r"^sigma: "):
        SmoothedEnergy(sigma=sigma)
    with pytest.raises(ValueError, match=r"^layers: "):
        SmoothedEnergy(layers=())


def test_unknown_grid_raises() -> None:
    model, call = flux()
    with apply(model, SmoothedEnergy()), pytest.raises(ValueError, match=r"handle\.grid"):
        run(model, call)


def test_equal_knobs_share_one_plan() -> None:
    layer = Layer(4, "self", "mid", 4, 8, 0, 16, 3, (4, 4))
    assert SmoothedEnergy().plan(layer, Step(0)) is SmoothedEnergy().plan(layer, Step(1))

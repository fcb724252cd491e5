"""PAG against an eager implementation of its formula, and against diffusers' processors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as stock
from torch import Tensor

from flashbrush.integrations import PerturbedAttention
from flashbrush.integrations.diffusers import Layer, Step, apply
from flashbrush.integrations.methods.shared.perturbed_guidance import adaptive, guide

from ..diffusers.tiny_images import ADDED, SDXL, sd3_call, tiny_sd3, tiny_unet, unet_call
from ..tiny import relative, tiny_call, tiny_flux
from .eager import Site, attend, changed_layers, descend, run, run_eagerly, sites_of, worst_layer

TOLERANCE = 1e-5  # float32, relative to the largest output
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


class EagerPAG:
    def __init__(self, names: tuple[str, ...], items: tuple[int, ...]) -> None:
        self.names, self.items = names, list(items)

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        if site.name in self.names:
            bias = torch.zeros(q.shape[2], k.shape[2])
            image = bias[site.text_len :, site.text_len :]
            image.fill_(-torch.inf).fill_diagonal_(0)
            out[self.items] = attend(q, k, v, bias)[self.items]
        return out


def unet(batch: int = 3) -> tuple[Any, dict]:
    model = tiny_unet()
    return model, unet_call(model, batch=batch)


def sd3(batch: int = 3, **settings) -> tuple[Any, dict]:
    return tiny_sd3(**settings), sd3_call(batch=batch)


def flux(batch: int = 3) -> tuple[Any, dict]:
    model = tiny_flux()
    return model, tiny_call(model, batch=batch)


ALL_SELF = tuple(site.name for site in sites_of(tiny_unet()) if site.is_self)
CASES = {
    "UNet": (unet, {}, (MID,), (2,)),
    "UNet, every layer": (unet, {"layers": "self"}, ALL_SELF, (2,)),
    "UNet, by index": (unet, {"layers": [4]}, (MID,), (2,)),
    "UNet, unguided": (unet, {"guided": False, "items": (1, 0)}, (MID,), (0, 1)),
    "SD 3": (sd3, {}, ("transformer_blocks.1.attn",), (2,)),
    "SD 3, two layers": (
        sd3,
        {"layers": (0, 2)},
        ("transformer_blocks.0.attn", "transformer_blocks.2.attn"),
        (2,),
    ),
    "FLUX": (
        flux,
        {"layers": (1, "single")},
        ("transformer_blocks.1.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"),
        (2,),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_eager(case: str) -> None:
    host, knobs, names, items = CASES[case]
    model, call = host()
    core = EagerPAG(names, items)
    expected = run_eagerly(model, call, core)
    with apply(model, PerturbedAttention(**knobs)):
        assert worst_layer(model, call, core) <= TOLERANCE
        assert relative(run(model, call), expected) <= TOLERANCE
        assert set(changed_layers(model, call)) == set(names)
    plain = run(model, call)
    others = [n for n in range(3) if n not in items]
    assert relative(expected[others], plain[others]) <= TOLERANCE < 1e-3 < relative(expected, plain)


def test_second_attention_of_sd_3_5_is_the_identity() -> None:
    model, call = sd3(dual=(0, 1), qk_norm="rms_norm")
    core = EagerPAG(("transformer_blocks.0.attn2", "transformer_blocks.1.attn2"), (2,))
    with apply(model, PerturbedAttention(layers="self")):
        assert worst_layer(model, call, core) <= TOLERANCE


def test_matches_diffusers_processors() -> None:
    for (model, call), name, guided, twin in (
        (unet(), MID, True, stock.PAGCFGIdentitySelfAttnProcessor2_0()),
        (unet(2), MID, False, stock.PAGIdentitySelfAttnProcessor2_0()),
        (sd3(), "transformer_blocks.1.attn", True, stock.PAGCFGJointAttnProcessor2_0()),
        (sd3(2), "transformer_blocks.1.attn", False, stock.PAGJointAttnProcessor2_0()),
    ):
        with apply(model, PerturbedAttention(guided=guided)):
            mine = run(model, call)
        model.get_submodule(name).processor = twin
        assert relative(mine, run(model, call)) <= TOLERANCE


@pytest.mark.parametrize("host", [unet, sd3, flux])
def test_run_matches_eager(host) -> None:
    """With classifier-free guidance and a falling scale."""
    model, call = host(1)
    key = "sample" if "sample" in call else "hidden_states"
    batched = {
        n: t.expand(3, *t.shape[1:]) if isinstance(t, Tensor) and t.dim() and "ids" not in n else t
        for n, t in call.items()
    }
    text = batched["encoder_hidden_states"].clone()
    text[0] = 0
    batched["encoder_hidden_states"] = text
    names = {"unet": (MID,), "sd3": ("transformer_blocks.1.attn",), "flux": ("transformer_blocks.1.attn",)}[
        host.__name__
    ]

    def mine(x: Tensor, i: int) -> Tensor:
        noise = run(model, batched | {key: x.expand(3, *x.shape[1:])})
        u, c, p = noise.split(1)
        return guide(p, c, u, scale=adaptive(3.0, 900 - 100 * i, 0.01), guidance=4.0)

    def theirs(x: Tensor, i: int) -> Tensor:
        noise = run_eagerly(model, batched | {key: x.expand(3, *x.shape[1:])}, EagerPAG(names, (2,)))
        scale = (2.0, 1.0, 0.0)[i]
        return noise[[0]] + 4 * (noise[[1]] - noise[[0]]) + scale * (noise[[1]] - noise[[2]])

    with apply(model, PerturbedAttention()):
        result = descend(mine, call[key])
    assert relative(result, descend(theirs, call[key])) <= TOLERANCE


def test_guidance_matches_its_formula() -> None:
    p, c, u = torch.randn(3, 1, 4, 4, 4).unbind()
    assert torch.equal(guide(p, c, scale=3.0), c + 3 * (c - p))
    assert torch.equal(guide(c, c, u, scale=3.0, guidance=1.0), u + (c - u))
    assert [adaptive(3.0, t, 0.005) for t in (1000, 800, 200)] == [3.0, 2.0, 0.0] and adaptive(
        3.0, 1, 0.0
    ) == 3.0


@pytest.mark.parametrize(
    "change", [{"layers": "up"}, {"items": (0,)}, {"guided": False}, {"steps": (1, None)}], ids=str
)
def test_each_knob_changes_the_output(change: dict) -> None:
    model, call = unet(6)
    method = PerturbedAttention()
    with apply(model, method) as handle:
        handle.set_step(0)
        before = run(model, call)
        handle.method = dataclasses.replace(method, **change)
        assert relative(run(model, call), before) > 1e-4


def test_steps_outside_the_window_are_plain() -> None:
    model, call = unet()
    plain = run(model, call)
    with apply(model, PerturbedAttention(steps=(1, 2))):
        assert [relative(run(model, call), plain) > 1e-3 for _ in range(3)] == [False, True, False]


def test_all_middle_layers_of_sdxl_are_perturbed() -> None:
    model = tiny_unet(SDXL)
    with apply(model, PerturbedAttention()):
        assert len(changed_layers(model, unet_call(model, batch=3))) == 2


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"layers": ()}, "^layers: "),
        ({"layers": "middle"}, "^layers: .*middle"),
        ({"layers": (-1,)}, "^layers: "),
        ({"layers": (True,)}, "^layers: "),
        ({"items": ()}, "^items: "),
        ({"items": (1, 1)}, "^items: "),
        ({"items": (0.5,)}, "^items: "),
        ({"guided": 1}, "^guided: "),
        ({"steps": 3}, "^steps: "),
    ],
    ids=str,
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PerturbedAttention(**knob)


@pytest.mark.parametrize(
    ("knobs", "batch", "match"),
    [
        ({}, 4, "3 equal parts"),
        ({"guided": False}, 3, "2 equal parts"),
        ({"items": (5,)}, 3, "items below the batch of 3"),
        ({"layers": (5,)}, 3, "layer 5 is 'cross'"),
    ],
)
def test_call_that_does_not_fit_raises(knobs: dict, batch: int, match: str) -> None:
    model, call = unet(batch)
    with apply(model, PerturbedAttention(**knobs)), pytest.raises(ValueError, match=match):
        run(model, call)


def test_layer_with_added_keys_raises() -> None:
    model = tiny_unet(ADDED)
    with apply(model, PerturbedAttention()), pytest.raises(ValueError, match="'added'"):
        run(model, unet_call(model, batch=3))


def test_equal_knobs_share_one_plan() -> None:
    layer = Layer(4, "self", "mid", 4, 8, 0, 16, 3, (4, 4))
    assert PerturbedAttention().plan(layer, Step(0)) is PerturbedAttention().plan(layer, Step(1))

"""Regional prompting against an eager implementation of its formulas."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashbrush.integrations import RegionalPrompting
from flashbrush.integrations.diffusers import apply

from ..diffusers.tiny_images import ADDED, sd3_call, tiny_sd3, tiny_unet, unet_call
from ..tiny import COLUMNS, ROWS, relative, tiny_call, tiny_flux
from .eager import (
    LargestTensor,
    Site,
    attend,
    changed_layers,
    descend,
    run,
    run_eagerly,
    sites_of,
    worst_layer,
)

TOLERANCE = 1e-5  # float32, relative to the largest output
SPANS = ((3, 5), (1, 2))  # of 5 tokens; 0 and 2 belong to no region


def two_regions(side: tuple[int, int] = (16, 16)) -> Tensor:
    """Two regions that overlap; some places are in neither."""
    masks = torch.zeros(2, *side)
    masks[0, :, : side[1] // 2] = 1
    masks[1, side[0] // 2 :, side[1] // 4 :] = 1
    masks[:, :, -side[1] // 4 :] = 0
    return masks


def soft_regions() -> Tensor:
    x = torch.linspace(-2, 2, 16).expand(16, 16)
    return torch.stack([0.6 * x.sigmoid(), (2 * x.T).sigmoid()])


class EagerRegions:
    def __init__(self, method: RegionalPrompting, grids: dict[int, tuple[int, int]]) -> None:
        self.method, self.grids = method, grids

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        m, out = self.method, attend(q, k, v)
        if not site.cross and not site.text_len:
            return out
        items = list(range(len(q)) if m.items is None else m.items)
        tokens, text = q.shape[2] - site.text_len, site.text_len or k.shape[2]
        grid, first = self.grids[tokens], site.text_len
        masks = F.adaptive_avg_pool2d(m.masks, grid).flatten(1)
        if m.form == "bias":
            bias, log = torch.zeros(q.shape[2], k.shape[2]), math.log(m.outside) if m.outside else -math.inf
            for r, (a, b) in enumerate(m.spans):
                out_of = torch.arange(tokens)[masks[r] < 0.5]
                bias[first + out_of[:, None], torch.arange(a, b)] = log
                if m.closed and not site.cross:
                    bias[torch.arange(a, b)[:, None], first + out_of] = log
                    for s, (c, d) in enumerate(m.spans):
                        if s != r:
                            bias[a:b, c:d] = log
            out[items] = attend(q, k, v, bias)[items]
            return out
        share = (1 - m.shared) * masks / masks.sum(0).clamp(min=1)
        rest = [j for j in range(text) if not any(a <= j < b for a, b in m.spans)]
        mixed = (1 - share.sum(0))[:, None] * attend(q, k[:, :, rest], v[:, :, rest])
        for r, (a, b) in enumerate(m.spans):
            mixed = mixed + share[r][:, None] * attend(q, k[:, :, a:b], v[:, :, a:b])
        out[items] = mixed[items]
        return out


def unet(side: tuple[int, int] = (8, 8)) -> tuple[Any, dict, dict]:
    model, grids = tiny_unet(), [side, (side[0] // 2, side[1] // 2)]
    return model, unet_call(model, side=side), {a * b: (a, b) for a, b in grids}


def sd3() -> tuple[Any, dict, dict]:
    return tiny_sd3(), sd3_call(), {16: (4, 4)}


def flux() -> tuple[Any, dict, dict]:
    model = tiny_flux()
    return model, tiny_call(model, batch=2), {ROWS * COLUMNS: (ROWS, COLUMNS)}


CASES = {
    "UNet, hard": (unet, {}),
    "UNet, soft": (unet, {"outside": 0.2}),
    "UNet, some items": (unet, {"items": (1,)}),
    "UNet, oblong": (lambda: unet((4, 12)), {}),
    "UNet, groups": (unet, {"form": "groups"}),
    "UNet, soft groups": (unet, {"form": "groups", "masks": soft_regions(), "shared": 0.3}),
    "UNet, groups of some items": (unet, {"form": "groups", "items": [0]}),
    "UNet, one region": (unet, {"masks": two_regions()[:1], "spans": ((0, 2),)}),
    "SD 3, hard": (sd3, {}),
    "SD 3, closed": (sd3, {"closed": True}),
    "SD 3, soft, closed, some items": (sd3, {"closed": True, "outside": 0.1, "items": (1,)}),
    "FLUX, hard": (flux, {}),
    "FLUX, closed, some items": (flux, {"closed": True, "items": (1,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_eager(case: str) -> None:
    host, knobs = CASES[case]
    model, call, grids = host()
    method = RegionalPrompting(**({"masks": two_regions(), "spans": SPANS} | knobs))
    core = EagerRegions(method, grids)
    expected, plain = run_eagerly(model, call, core), run(model, call)
    with apply(model, method) as handle:
        handle.grid = (ROWS, COLUMNS)
        assert worst_layer(model, call, core) <= TOLERANCE
        assert relative(run(model, call), expected) <= TOLERANCE
        assert set(changed_layers(model, call)) == {site.name for site in sites_of(model) if not site.is_self}
    assert relative(expected, plain) > 1e-3
    others = [n for n in range(2) if n not in (method.items or (0, 1))]
    assert not others or relative(expected[others], plain[others]) <= TOLERANCE


@pytest.mark.parametrize(
    ("host", "knobs"), [(unet, {}), (unet, {"form": "groups"}), (sd3, {"closed": True}), (flux, {})]
)
def test_run_matches_eager(host, knobs: dict) -> None:
    """The method controls the last two of three steps."""
    model, call, grids = host()
    key = "sample" if "sample" in call else "hidden_states"
    method = RegionalPrompting(two_regions(), SPANS, steps=(1, None), **knobs)
    core = EagerRegions(method, grids)
    with apply(model, method) as handle:
        handle.grid = (ROWS, COLUMNS)
        out = descend(lambda x, i: run(model, call | {key: x}), call[key])
    theirs = descend(
        lambda x, i: run_eagerly(model, call | {key: x}, core) if i else run(model, call | {key: x}),
        call[key],
    )
    assert relative(out, theirs) <= TOLERANCE


def test_words_do_not_reach_outside_their_region() -> None:
    """Within a layer, other words of a region do not change image tokens outside of it."""
    model, call, _ = unet()
    name, seen = "down_blocks.0.attentions.0.transformer_blocks.0.attn2", []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    for form in ("bias", "groups"):
        seen.clear()
        with apply(model, RegionalPrompting(two_regions(), SPANS, form=form)):
            run(model, call)
            other = call["encoder_hidden_states"].clone()
            other[:, 3:5] += 1
            run(model, call | {"encoder_hidden_states": other})
        inside = F.adaptive_avg_pool2d(two_regions(), (8, 8))[0].flatten() > 0.5
        assert (
            torch.equal(seen[0][:, ~inside], seen[1][:, ~inside])
            and relative(seen[0][:, inside], seen[1][:, inside]) > 1e-3
        )


@pytest.mark.parametrize(
    "change",
    [
        {"masks": two_regions().flip(2)},
        {"spans": ((0, 2), (2, 3))},
        {"form": "groups"},
        {"outside": 0.5},
        {"items": (0,)},
        {"steps": (1, None)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_knob_changes_the_output(change: dict) -> None:
    model, call, _ = unet()
    method = RegionalPrompting(two_regions(), SPANS)
    with apply(model, method) as handle:
        handle.set_step(0)
        before = run(model, call)
        handle.method = dataclasses.replace(method, **change)
        assert relative(run(model, call), before) > 1e-4
        for name, value in change.items():
            setattr(method, name, value)
        handle.method = method
        assert relative(run(model, call), before) > 1e-4


def test_knob_of_each_form_changes_the_output() -> None:
    model, call, _ = unet()
    joint, joint_call, _ = sd3()
    for host, inputs, knobs, change in (
        (model, call, {"form": "groups"}, {"shared": 0.5}),
        (joint, joint_call, {}, {"closed": True}),
    ):
        outs = []
        for more in ({}, change):
            with apply(host, RegionalPrompting(two_regions(), SPANS, **knobs, **more)):
                outs.append(run(host, inputs))
        assert relative(*outs) > 1e-4


@pytest.mark.parametrize(
    "knobs",
    [{"shared": 0.5}, {"form": "groups", "outside": 0.5}, {"form": "groups", "closed": True}],
    ids=lambda k: [*k][-1],
)
def test_knob_of_the_other_form_raises(knobs: dict) -> None:
    model, call, _ = unet()
    with (
        apply(model, RegionalPrompting(two_regions(), SPANS, **knobs)),
        pytest.raises(ValueError, match=f"^{[*knobs][-1]}: the form"),
    ):
        run(model, call)


def test_neutral_knobs_are_plain_attention() -> None:
    model, call, _ = unet()
    plain = run(model, call)
    for method in (
        RegionalPrompting(two_regions(), SPANS, outside=1.0),
        RegionalPrompting(torch.ones(2, 4, 4), SPANS),
        RegionalPrompting(torch.ones(1, 4, 4), ((0, 5),), form="groups"),
    ):
        with apply(model, method):
            assert relative(run(model, call), plain) <= TOLERANCE


def test_makes_no_attention_map() -> None:
    model = tiny_sd3(layers=1)
    model = type(model)(
        **(
            dict(model.config)
            | {
                "pos_embed_max_size": 64,
                "sample_size": 128,
                "num_attention_heads": 1,
                "attention_head_dim": 32,
            }
        )
    ).eval()
    with apply(model, RegionalPrompting(two_regions(), SPANS)), LargestTensor() as largest:
        run(model, sd3_call(batch=1, side=(128, 128)))
    assert largest.elements < 4096**2


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"masks": torch.ones(4, 4)}, "^masks: "),
        ({"masks": 2 * torch.ones(2, 4, 4)}, "^masks: "),
        ({"spans": ((0, 2),)}, "^spans: "),
        ({"spans": ((0, 3), (2, 4))}, "^spans: "),
        ({"spans": ((0, 3), (4, 4))}, "^spans: "),
        ({"spans": (1, 2)}, "^spans: "),
        ({"spans": 3}, "^spans: "),
        ({"form": "mask"}, "^form: "),
        ({"outside": 1.5}, "^outside: "),
        ({"shared": -0.1}, "^shared: "),
        ({"closed": 1}, "^closed: "),
        ({"items": ()}, "^items: "),
        ({"items": (0, 0)}, "^items: "),
        ({"steps": 4}, "^steps: "),
    ],
    ids=lambda knob: next(iter(knob)) if isinstance(knob, dict) else None,
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RegionalPrompting(**({"masks": two_regions(), "spans": SPANS} | knob))
    method = RegionalPrompting(two_regions(), SPANS)
    with pytest.raises(ValueError, match=r"^masks: .*2 regions"):
        method.masks = two_regions()[:1]


def test_call_that_does_not_fit_raises() -> None:
    model, call, _ = unet()
    joint, joint_call, _ = sd3()
    added = tiny_unet(ADDED)
    packed, packed_call, _ = flux()
    for host, inputs, method, match in (
        (model, call, RegionalPrompting(two_regions(), ((3, 9), (1, 2))), "^spans: .*which has 5"),
        (model, call, RegionalPrompting(two_regions(), SPANS, items=(2,)), "^items: "),
        (joint, joint_call, RegionalPrompting(two_regions(), SPANS, form="groups"), "^form: 'groups'"),
        (added, unet_call(added), RegionalPrompting(two_regions(), SPANS), "^form: 'bias'"),
        (packed, packed_call, RegionalPrompting(two_regions(), SPANS), r"handle\.grid"),
    ):
        with apply(host, method), pytest.raises(ValueError, match=match):
            run(host, inputs)

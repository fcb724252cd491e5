"""IP-Adapters against diffusers' own processor, and against an eager implementation of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import ImagePrompt, IPAdapter
from flashbrush.integrations.diffusers import apply

from ..diffusers.tiny_images import SD15, SDXL, TEXT_CHANNELS, sd3_call, tiny_sd3, tiny_unet, unet_call
from ..tiny import relative
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
EMBED = 6  # channels of the image encoder's output


def adapter_state(unet: Any, seed: int) -> dict:
    """A published adapter's, with 4 tokens, numbered in the order of the layers' names."""
    generator, weights, number = torch.Generator().manual_seed(seed), {}, 1
    for name in unet.attn_processors:
        if "attn2" in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for which in "kv":
                weight = torch.randn(inner, TEXT_CHANNELS, generator=generator) * TEXT_CHANNELS**-0.5
                weights[f"{number}.to_{which}_ip.weight"] = weight
            number += 2
    shapes = {
        "proj.weight": (4 * TEXT_CHANNELS, EMBED),
        "proj.bias": (4 * TEXT_CHANNELS,),
        "norm.weight": (TEXT_CHANNELS,),
        "norm.bias": (TEXT_CHANNELS,),
    }
    return {
        "image_proj": {n: torch.randn(s, generator=generator) for n, s in shapes.items()},
        "ip_adapter": weights,
    }


def image_embeds(images: int, batch: int = 2, seed: int = 7) -> Tensor:
    return torch.randn(batch, images, EMBED, generator=torch.Generator().manual_seed(seed + images))


def image_masks(images: int, side: tuple[int, int] = (32, 32)) -> Tensor:
    """Soft masks, each around one part of the image."""
    x = torch.linspace(0, 1, side[1]).expand(images, *side)
    return (3 * (x - torch.arange(images)[:, None, None] / images)).sigmoid()[None]


class AdapterCase:
    """A tiny UNet with the same adapters as diffusers' processors and as ImagePrompts."""

    def __init__(self, config: dict, images: tuple[int, ...], side: tuple[int, int] = (8, 8)) -> None:
        self.model, self.twin = tiny_unet(config), tiny_unet(config)
        self.call = unet_call(self.model, batch=2, side=side)
        states = [adapter_state(self.model, seed) for seed in range(len(images))]
        self.embeds = [image_embeds(n) for n in images]
        self.prompts = [
            ImagePrompt.load(self.model, s).showing(e) for s, e in zip(states, self.embeds, strict=True)
        ]
        self.twin._load_ip_adapter_weights(states, low_cpu_mem_usage=False)

    def diffusers(self, call: dict, scale: Any, masks: list | None = None) -> Tensor:
        for name, processor in self.twin.attn_processors.items():
            if hasattr(processor, "scale"):
                processor.scale = scale(name) if callable(scale) else scale  # type: ignore[union-attr]
        added = call.get("added_cond_kwargs", {}) | {"image_embeds": self.embeds}
        more = {} if masks is None else {"cross_attention_kwargs": {"ip_adapter_masks": masks}}
        return run(self.twin, call | {"added_cond_kwargs": added} | more)

    def eager(self, scale: list[float], masks: list | None = None):
        grids = {
            n: (self.call["sample"].shape[2] // d, self.call["sample"].shape[3] // d)
            for d in (1, 2)
            for n in [self.call["sample"][0, 0].numel() // d**2]
        }

        def core(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(q, k, v)
            if not site.cross:
                return out
            for a, prompt in enumerate(self.prompts):
                tokens = prompt.tokens
                assert tokens is not None
                ik, iv = (
                    (tokens @ w.T).unflatten(-1, (site.attn.heads, -1)) for w in prompt.weights[site.name]
                )
                if masks is None or masks[a] is None:
                    out = out + scale[a] * attend(q, *(t.flatten(1, 2).transpose(1, 2) for t in (ik, iv)))
                    continue
                small = F.interpolate(masks[a], grids[q.shape[2]], mode="bicubic").flatten(2)
                for i in range(tokens.shape[1]):
                    one = attend(q, ik[:, i].transpose(1, 2), iv[:, i].transpose(1, 2))
                    out = out + scale[a] * small[:, i, :, None][:, None] * one
            return out

        return core


CASES = {
    "one": (SD15, (1,), [0.7], None),
    "two": (SD15, (1, 2), [1.0, 0.4], None),
    "SDXL": (SDXL, (2,), [0.8], None),
    "masks": (SD15, (2,), [1.0], [image_masks(2)]),
    "masks of one of two": (SD15, (1, 3), [0.6, 0.9], [None, image_masks(3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_eager_and_diffusers(name: str) -> None:
    config, images, scale, regions = CASES[name]
    case = AdapterCase(config, images)
    core = case.eager(scale, regions)
    expected = run_eagerly(case.model, case.call, core)
    with apply(case.model, IPAdapter(case.prompts, scale, regions)):
        out = run(case.model, case.call)
        assert worst_layer(case.model, case.call, core) <= TOLERANCE
    assert relative(out, expected) <= TOLERANCE < 1e-2 < relative(out, run(case.model, case.call))
    assert relative(out, case.diffusers(case.call, scale, regions)) <= TOLERANCE


def test_grid_that_is_not_square_matches_eager_and_diffusers() -> None:
    case = AdapterCase(SD15, (2,), side=(4, 12))
    regions = [image_masks(2, (16, 48))]
    with apply(case.model, IPAdapter(case.prompts, 0.9, regions)):
        out = run(case.model, case.call)
    assert relative(out, run_eagerly(case.model, case.call, case.eager([0.9], regions))) <= TOLERANCE
    assert relative(out, case.diffusers(case.call, [0.9], regions)) <= TOLERANCE


def test_run_matches_diffusers() -> None:
    case = AdapterCase(SD15, (1, 2))
    regions = [image_masks(1), image_masks(2)]
    with apply(case.model, IPAdapter(case.prompts, [0.7, 0.5], regions)):
        out = descend(lambda x, i: run(case.model, case.call | {"sample": x}), case.call["sample"])
    for step in (
        lambda x, i: run_eagerly(case.model, case.call | {"sample": x}, case.eager([0.7, 0.5], regions)),
        lambda x, i: case.diffusers(case.call | {"sample": x}, [0.7, 0.5], regions),
    ):
        assert relative(out, descend(step, case.call["sample"])) <= TOLERANCE


@pytest.mark.parametrize(
    ("scale", "of"),
    [
        ({"up": 0.8}, lambda name: 0.8 if name.startswith("up") else 0.0),
        (
            {"down": 0.5, "up_blocks.1": 1.0},
            lambda n: 0.5 if n.startswith("down") else 1.0 * n.startswith("up_blocks.1"),
        ),
        (
            {"up": 1.0, "up_blocks.1.attentions.1": 0.2},
            lambda name: 0.2 if "up_blocks.1.attentions.1" in name else 1.0 * name.startswith("up"),
        ),
        ({5: 0.6}, lambda name: 0.6 * name.startswith("mid")),
    ],
    ids=["a place", "the beginning of a name", "a longer name", "an index"],
)
def test_scale_for_some_layers_changes_these_alone(scale: dict, of) -> None:
    case = AdapterCase(SD15, (1,))
    with apply(case.model, IPAdapter(case.prompts, scale)):
        out = run(case.model, case.call)
        expected = {site.name for site in sites_of(case.model) if "attn2" in site.name and of(site.name)}
        assert set(changed_layers(case.model, case.call)) == expected
    assert relative(out, case.diffusers(case.call, lambda name: [of(name)])) <= TOLERANCE


def test_knobs_set_later_keep_keys_until_prompts_change(monkeypatch: pytest.MonkeyPatch) -> None:
    case = AdapterCase(SD15, (2,))
    calls: list[int] = []

    def spy(q, k, v, control=None, **options):
        calls.append(len(k) if isinstance(k, list) else 1)
        return fb.attention(q, k, v, control, **options)

    monkeypatch.setattr("flashbrush.integrations.diffusers.protocol.plan_call.attention", spy)
    method, plain = IPAdapter(case.prompts), run(case.model, case.call)
    with apply(case.model, method):
        outs = [run(case.model, case.call)]
        kept = [method._kept[key][0] for key in sorted(method._kept)]
        assert calls == [2] * 7  # one launch per cross-attention
        method.scale = 0.5
        outs.append(run(case.model, case.call))
        method.masks = [image_masks(2)]
        outs.append(run(case.model, case.call))
        assert calls[-1] == 3
        assert all(a is method._kept[key][0] for a, key in zip(kept, sorted(method._kept), strict=True))
        method.prompts = [case.prompts[0].showing(image_embeds(2, seed=99))]
        assert not method._kept
        outs.append(run(case.model, case.call))
        assert len(kept) == 7 and not any(
            a is method._kept[key][0] for a, key in zip(kept, sorted(method._kept), strict=True)
        )
        method.scale = 0
        assert relative(run(case.model, case.call), plain) <= TOLERANCE
    assert all(relative(a, b) > 1e-3 for i, a in enumerate(outs) for b in outs[:i])


def test_makes_no_attention_map() -> None:
    model = tiny_unet(SD15, attention_head_dim=1)
    prompt = ImagePrompt.load(model, adapter_state(model, 0)).showing(
        tokens=torch.randn(1, 1, 1024, TEXT_CHANNELS)
    )
    with apply(model, IPAdapter([prompt])), LargestTensor() as largest:
        run(model, unet_call(model, batch=1, side=(64, 64)))
    assert largest.elements < 4096 * 1024


def test_wrong_input_raises() -> None:
    case = AdapterCase(SD15, (2,))
    for knobs, match in (
        ({"prompts": ()}, "^prompts: "),
        ({"prompts": [ImagePrompt({})]}, "^prompts: "),
        ({"scale": [1.0, 1.0]}, "^scale: "),
        ({"scale": float("nan")}, "^scale: "),
        ({"scale": "strong"}, "^scale: "),
        ({"scale": {"up": None}}, "^scale: "),
        ({"masks": [image_masks(3)]}, "^masks: "),
        ({"masks": [image_masks(2)[0]]}, "^masks: "),
        ({"masks": []}, "^masks: "),
    ):
        with pytest.raises(ValueError, match=match):
            IPAdapter(**({"prompts": case.prompts} | knobs))  # type: ignore[arg-type]
    method = IPAdapter(case.prompts, masks=[image_masks(2)])
    with pytest.raises(ValueError, match=r"^prompts: .*1 adapters"):
        method.prompts = case.prompts * 2
    with pytest.raises(ValueError, match=r"^masks: "):
        method.prompts = [case.prompts[0].showing(image_embeds(1))]
    with pytest.raises(ValueError, match="showing: "):
        case.prompts[0].showing(tokens=torch.zeros(2, 4, TEXT_CHANNELS))
    state = adapter_state(case.model, 0)
    del state["ip_adapter"]["3.to_k_ip.weight"]
    with pytest.raises(ValueError, match=r"state: .*3\.to_k_ip\.weight"):
        ImagePrompt.load(case.model, state)
    lora = adapter_state(case.model, 0)
    lora["ip_adapter"]["0.to_q_lora.down.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"state: .*to_q_lora"):
        ImagePrompt.load(case.model, lora)
    sd3 = tiny_sd3()
    with pytest.raises(TypeError, match="UNets"):
        ImagePrompt.load(sd3, state)
    with apply(sd3, IPAdapter(case.prompts)), pytest.raises(ValueError, match="'joint'"):
        run(sd3, sd3_call())
    three = unet_call(case.model, batch=3)
    with apply(case.model, IPAdapter(case.prompts)), pytest.raises(ValueError, match="1 or 3"):
        run(case.model, three)


def test_loading_does_not_change_the_model() -> None:
    model = tiny_unet()
    before = {n: p.clone() for n, p in model.state_dict().items()}, dict(model.config), model.encoder_hid_proj
    ImagePrompt.load(model, adapter_state(model, 0))
    assert dict(model.config) == before[1] and model.encoder_hid_proj is before[2]
    assert set(model.state_dict()) == set(before[0])
    assert {type(p).__name__ for p in model.attn_processors.values()} == {"AttnProcessor2_0"}

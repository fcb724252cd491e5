"""InfEdit's attention control and sampler against an eager implementation."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from flashbrush.integrations import InfEdit, MutualBlend, MutualRoles, PromptEdit, TokenAlignment
from flashbrush.integrations.diffusers import Layer, Step, apply
from flashbrush.integrations.methods.shared.ddcm import ddcm_step

from ..diffusers.tiny_images import tiny_unet, unet_call
from ..tiny import forward as flux_forward, relative, tiny_call, tiny_flux
from .eager import Edit, editing, largest_tensor, probabilities, run, worst_edit

TOLERANCE = 1e-5  # float32, relative to the largest output
LENGTH = 7  # text tokens
SELF, CROSS, CROSS_4 = range(0, 14, 2), range(1, 14, 2), (3, 5, 7, 9)  # the tiny UNet's attention layers
INDEX, NEW = torch.tensor([0, 1, -1, 2, -1, 3, 6]), torch.tensor([0.0, 0, 1, 0, 1, 0, 0])
MAPPER = torch.zeros(LENGTH, LENGTH)
for _j, _i in enumerate(INDEX.tolist()):
    MAPPER[_i, _j] = float(_i >= 0)
REFINE = PromptEdit(TokenAlignment(MAPPER, 1 - NEW))
HALVES = (MutualRoles(conditional=False), MutualRoles(3, 4, 5))
WORDS = ([2, 3], [1])  # of the target and of the mutual item


def self_attention(roles: tuple[MutualRoles, ...], early: bool) -> Edit:
    def edit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = probabilities(q, k) @ v
        for r in roles:
            s, t, m = r.source, r.target, r.mutual
            if early:
                out[t] = probabilities(q[s], k[s]) @ v[t]
                out[m] = probabilities(q[s], k[s]) @ v[s]
            else:
                out[m] = probabilities(q[t], k[s]) @ v[s]
        return out

    return edit


def cross_attention(roles: tuple[MutualRoles, ...], seen: list[Tensor] | None = None) -> Edit:
    def edit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prob = probabilities(q, k)
        if seen is not None:
            seen.append(
                torch.stack([prob[-2].mean(0)[:, WORDS[0]].sum(-1), prob[-1].mean(0)[:, WORDS[1]].sum(-1)])
            )
        for r in roles:
            if r.conditional:
                prob[r.target] = prob[r.source][..., INDEX] * (1 - NEW) + prob[r.target] * NEW
        return prob @ v

    return edit


def edits_of(roles: tuple[MutualRoles, ...], progress: float) -> dict[int, Edit]:
    edits: dict[int, Edit] = dict.fromkeys(SELF, self_attention(roles, progress < 0.3))
    return edits | (dict.fromkeys(CROSS, cross_attention(roles)) if progress <= 0.7 else {})


@pytest.mark.parametrize("step", [0, 3, 7, 8])
@pytest.mark.parametrize("items", [3, 6])
def test_matches_eager(items: int, step: int) -> None:
    """Of ten steps: self-attention is the source's below 3, cross-attention is refined up to 7."""
    model = tiny_unet()
    call = unet_call(model, batch=items, text=LENGTH)
    edits = edits_of(HALVES if items == 6 else (MutualRoles(),), step / 10)
    with editing(model, edits):
        expected = run(model, call)
    plain = run(model, call)
    with apply(model, InfEdit(REFINE)) as handle:
        handle.set_step(step, 10)
        out = run(model, call)
        assert worst_edit(model, call, edits) <= TOLERANCE
    assert relative(out, expected) <= TOLERANCE
    sources = [0, 3] if items == 6 else [0]
    assert relative(out[sources], plain[sources]) <= TOLERANCE
    assert relative(out[[n + 2 for n in sources]], plain[[n + 2 for n in sources]]) > 1e-2
    assert (relative(out[sources[-1] + 1], plain[sources[-1] + 1]) > 1e-3) is (step < 8)


def test_other_items_of_the_batch_match_eager() -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4, text=LENGTH)
    roles = (MutualRoles(3, 0, 2),)
    with editing(model, edits_of(roles, 0.4)):
        expected = run(model, call)
    with apply(model, InfEdit(REFINE, items=roles, count=10)) as handle:
        handle.set_step(4)
        assert relative(run(model, call), expected) <= TOLERANCE


# The sampler


def eager_step(
    x: list[Tensor], e: list[Tensor], clean: Tensor, ab: float, after: float, n: Tensor, eta: float
):
    """[x' of each item]"""
    e_cons = (x[0] - ab**0.5 * clean) / (1 - ab) ** 0.5
    sd, out = eta * (1 - after), []
    for one, predicted in zip(x, e, strict=True):
        x0 = clean + ((one - x[0]) - (1 - ab) ** 0.5 * (predicted - e[0])) / ab**0.5
        direction = (predicted - e[0]) + e_cons
        out.append(after**0.5 * x0 + (1 - after - sd) ** 0.5 * direction + sd**0.5 * n)
    return out


def levels(steps: int) -> tuple[Tensor, list[float]]:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps, [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), 1.0]


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_run_matches_eager(eta: float) -> None:
    """Four blended steps, after which the source is as before."""
    model = tiny_unet()
    call = unet_call(model, batch=6, text=LENGTH)
    generator = torch.Generator().manual_seed(5)
    clean, *fresh = torch.randn(6, 1, 4, 8, 8, generator=generator).unbind()
    timesteps, alphas = levels(4)
    start = (alphas[0] ** 0.5 * clean + (1 - alphas[0]) ** 0.5 * fresh[4]).repeat(3, 1, 1, 1)

    def predict(latents: Tensor, i: int) -> Tensor:
        noise = run(model, call | {"sample": torch.cat([latents, latents]), "timestep": timesteps[i]})
        return noise[:3] + torch.tensor([1.0, 2, 2]).reshape(3, 1, 1, 1) * (noise[3:] - noise[:3])

    theirs, seen = start, []
    for i in range(4):
        with ExitStack() as stack:
            edits = edits_of(HALVES, i / 4)
            looked = cross_attention(HALVES if i / 4 <= 0.7 else (), seen)
            stack.enter_context(editing(model, edits | dict.fromkeys(CROSS_4, looked)))
            noise = predict(theirs, i)
        theirs = torch.cat(
            eager_step([*theirs.split(1)], [*noise.split(1)], clean, alphas[i], alphas[i + 1], fresh[i], eta)
        )
        maps = torch.nn.functional.max_pool2d(torch.stack(seen).sum(0).unflatten(1, (4, 4)), 3, 1, 1)
        masks = maps / maps.amax((1, 2), keepdim=True) > torch.tensor([0.9, 0.8])[:, None, None]
        on, also = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
        picked = on.float() * theirs[1] + (~on & also).float() * theirs[2] + (~on & ~also).float() * theirs[0]
        assert all(0 < int(mask.sum()) < 64 for mask in (on, ~on & also, ~on & ~also)) or i
        theirs = torch.stack([theirs[0], picked, theirs[2]])

    blend = MutualBlend(*WORDS, 0.9, 0.8, 4)
    mine = start
    with apply(model, InfEdit(REFINE, count=4, blend=blend)):
        for i in range(4):
            mine, begun = ddcm_step(mine, predict(mine, i), clean, alphas[i], alphas[i + 1], fresh[i], eta)
            assert relative(begun[:1], clean) <= TOLERANCE
            mine = blend(mine)
    assert relative(mine, theirs) <= TOLERANCE
    assert relative(mine[:1], clean) <= TOLERANCE and relative(mine[1:2], clean) > 1e-2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alpha": 1.0}, "^alpha: "),
        ({"next_alpha": 0.0}, "^next_alpha: "),
        ({"noise": torch.zeros(2, 4, 8, 8)}, "^noise: "),
        ({"clean": torch.zeros(3, 4, 8, 8)}, "^clean: "),
        ({"fresh": torch.zeros(1, 4, 8, 9)}, "^fresh: "),
        ({"eta": 2.0}, "^eta: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_sampler_argument_raises(change: dict[str, Any], match: str) -> None:
    one = torch.zeros(1, 4, 8, 8)
    arguments = {
        "latents": one.repeat(3, 1, 1, 1),
        "noise": one.repeat(3, 1, 1, 1),
        "clean": one,
        "fresh": one,
    }
    with pytest.raises(ValueError, match=match):
        ddcm_step(**(arguments | {"alpha": 0.5, "next_alpha": 0.6} | change))


@pytest.mark.parametrize(
    "change",
    [
        {"edit": PromptEdit(weights={1: 3.0})},
        {"self_share": 0.1},
        {"cross_share": 0.1},
        {"count": 5},
        {"items": MutualRoles(0, 1, 2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_knob_changes_the_output(change: dict) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=6, text=LENGTH)
    method = InfEdit(REFINE)
    with apply(model, method) as handle:
        handle.set_step(2)
        before = run(model, call)
        handle.method = dataclasses.replace(method, **change)
        assert relative(run(model, call), before) > 1e-4


def test_same_image_three_times_is_plain_attention() -> None:
    model = tiny_unet()
    call = unet_call(model, batch=3, text=LENGTH)
    call |= {
        name: call[name][:1].expand(3, *call[name].shape[1:]) for name in ("sample", "encoder_hidden_states")
    }
    plain = run(model, call)
    with apply(model, InfEdit(PromptEdit())) as handle:
        for step in (0, 8):
            handle.set_step(step)
            assert relative(run(model, call), plain) <= TOLERANCE


def test_makes_no_attention_map() -> None:
    """No tensor is larger than in a plain call; the eager form shows that a map would be."""
    model = tiny_unet()
    call = unet_call(model, batch=6, side=(32, 32))
    with editing(model, {12: self_attention(HALVES, True)}):
        assert largest_tensor(model, call) >= 1024**2 * 16
    plain = largest_tensor(model, call)
    alignment = TokenAlignment(torch.eye(5), torch.tensor([1.0, 1, 0, 1, 1]))
    with apply(model, InfEdit(PromptEdit(alignment), blend=MutualBlend([1], [2], resolution=32))):
        assert largest_tensor(model, call) <= plain


def test_equal_knobs_share_one_plan() -> None:
    method = InfEdit(REFINE)
    for kind, text in (("self", 0), ("cross", LENGTH)):
        layer = Layer(3, kind, "up", 4, 8, text, 64, 6, (8, 8))
        assert method.plan(layer, Step(0)) is method.plan(layer, Step(1)) is not None


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"edit": None}, "^edit: "),
        ({"self_share": 1.5}, "^self_share: "),
        ({"cross_share": -1}, "^cross_share: "),
        ({"count": 0}, "^count: "),
        ({"blend": 0.6}, "^blend: "),
        ({"items": ()}, "^items: "),
    ],
    ids=str,
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        InfEdit(**({"edit": REFINE} | knob))


def test_call_that_does_not_fit_raises() -> None:
    model, flux = tiny_unet(), tiny_flux()
    with apply(model, InfEdit(REFINE)), pytest.raises(ValueError, match=r"^items: .*not 4 items"):
        run(model, unet_call(model, batch=4, text=LENGTH))
    with apply(flux, InfEdit(REFINE)), pytest.raises(ValueError, match="'double'"):
        flux_forward(flux, tiny_call(flux, batch=3))
    for name in ("target_threshold", "mutual_threshold"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            MutualBlend([1], [2], **{name: 1.5})
    with pytest.raises(ValueError, match=r"^latents: "):
        MutualBlend([1], [2])(torch.zeros(2, 4, 8, 8))

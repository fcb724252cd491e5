"""Prompt-to-Prompt against an eager implementation, which edits the maps."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from flashbrush.integrations import EditRoles, LocalBlend, PromptEdit, PromptToPrompt, TokenAlignment
from flashbrush.integrations.diffusers import Layer, Step, apply

from ..diffusers.tiny_images import SDXL, tiny_unet, unet_call
from ..tiny import forward as flux_forward, relative, tiny_call, tiny_flux
from .eager import Edit, editing, largest_tensor, probabilities, run, sample_ddim, worst_edit

TOLERANCE = 1e-5  # float32, relative to the largest output
LENGTH = 7  # text tokens
CROSS = range(1, 14, 2)  # the tiny UNet's attention layers, self and cross in turn
CROSS_4, SELF_4, SELF_8 = (3, 5, 7, 9), (2, 4, 6, 8), (0, 10, 12)  # of 4 x 4 and 8 x 8 tokens

# One word of two tokens for another of three, and then one more word
SPLIT = torch.eye(LENGTH)
SPLIT[:, 2:6] = 0
SPLIT[2:4, 2:5], SPLIT[4, 5] = 1 / 3, 1
INDEX = torch.tensor([0, 1, -1, 2, -1, 3, 6])
NEW = torch.tensor([0.0, 0, 1, 0, 1, 0, 0])
REFINED = torch.zeros(LENGTH, LENGTH)
for _j, _i in enumerate(INDEX.tolist()):
    REFINED[_i, _j] = float(_i >= 0)
REPLACE, REFINE = TokenAlignment(SPLIT, torch.ones(LENGTH)), TokenAlignment(REFINED, 1 - NEW)
WEIGHTS, SHARES = {3: 2.5, 5: 0.0}, {1: 0.9, 4: 0.1}


@dataclass
class EagerEdit:
    """One item's map, made from the source's and its own as published."""

    kind: str = "same"
    weights: dict[int, float] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)

    def maps(self, source: Tensor, own: Tensor, progress: float, share: float) -> Tensor:
        edited = source
        if self.kind == "replace":
            edited = source @ SPLIT
        if self.kind == "refine":
            edited = source[..., INDEX] * (1 - NEW) + own * NEW
        c = torch.tensor([self.weights.get(j, 1.0) for j in range(LENGTH)])
        gate = torch.tensor([float(progress < self.shares.get(j, share)) for j in range(LENGTH)])
        return edited * c * gate + own * (1 - gate)


def cross(edits: dict[int, EagerEdit], source: int, progress: float = 0.0, share: float = 0.8) -> Edit:
    def edit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain = probabilities(q, k)
        prob = plain.clone()
        for item, one in edits.items():
            prob[item] = one.maps(plain[source], plain[item], progress, share)
        return prob @ v

    return edit


def injected(items: list[int], source: int) -> Edit:
    def edit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prob = probabilities(q, k)
        prob[items] = prob[source].clone()
        return prob @ v

    return edit


EDITS = {
    "replace": (PromptEdit(REPLACE), EagerEdit("replace")),
    "refine": (PromptEdit(REFINE), EagerEdit("refine")),
    "reweight": (PromptEdit(weights=WEIGHTS), EagerEdit("same", WEIGHTS)),
    "replace and reweight": (PromptEdit(REPLACE, WEIGHTS), EagerEdit("replace", WEIGHTS)),
    "refine and reweight": (PromptEdit(REFINE, WEIGHTS), EagerEdit("refine", WEIGHTS)),
    "shares of words": (PromptEdit(REFINE, WEIGHTS, SHARES), EagerEdit("refine", WEIGHTS, SHARES)),
    "replace with shares": (PromptEdit(REPLACE, {}, SHARES), EagerEdit("replace", {}, SHARES)),
}


@pytest.mark.parametrize("step", [0, 42])
@pytest.mark.parametrize("edit", EDITS)
def test_cross_attention_matches_eager(edit: str, step: int) -> None:
    mine, theirs = EDITS[edit]
    model = tiny_unet()
    call = unet_call(model, batch=4, text=LENGTH)
    edits = dict.fromkeys(CROSS, cross({3: theirs}, 2, step / 50))
    with editing(model, edits):
        expected = run(model, call)
    with apply(model, PromptToPrompt(mine, self_share=0.0)) as handle:
        handle.set_step(step)
        out = run(model, call)
        assert worst_edit(model, call, edits) <= TOLERANCE
    assert relative(out, expected) <= TOLERANCE
    plain = run(model, call)
    assert relative(out[:3], plain[:3]) <= TOLERANCE
    assert (relative(out[3], plain[3]) > 1e-3) is (step < 40 or bool(theirs.shares))


def test_several_edits_of_one_source_match_eager() -> None:
    """A batch of twice four images; the unconditional half stays plain."""
    model = tiny_unet(SDXL)
    call = unet_call(model, batch=8, text=LENGTH)
    chosen = ("replace", "refine", "shares of words")
    edits = {5 + n: EDITS[name][1] for n, name in enumerate(chosen)}
    layers = dict.fromkeys(range(1, 16, 2), cross(edits, 4)) | dict.fromkeys(
        range(0, 16, 2), injected([5, 6, 7], 4)
    )
    with editing(model, layers):
        expected = run(model, call)
    with apply(model, PromptToPrompt([EDITS[name][0] for name in chosen])):
        out = run(model, call)
    assert relative(out, expected) <= TOLERANCE
    assert relative(out[:5], run(model, call)[:5]) <= TOLERANCE


@pytest.mark.parametrize(("resolution", "layers"), [(8, SELF_4 + SELF_8), (4, SELF_4), (3, ())])
def test_self_attention_up_to_a_resolution_matches_eager(resolution: int, layers: tuple[int, ...]) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4, text=LENGTH)
    edits = dict.fromkeys(layers, injected([3], 2))
    with editing(model, edits):
        expected = run(model, call)
    with apply(model, PromptToPrompt(PromptEdit(), cross_share=0.0, self_resolution=resolution)):
        assert not edits or worst_edit(model, call, edits) <= TOLERANCE
    with apply(model, PromptToPrompt(PromptEdit(), cross_share=0.0, self_resolution=resolution)):
        assert relative(run(model, call), expected) <= TOLERANCE


def test_run_matches_eager() -> None:
    """Five steps of DDIM: cross-attention in four, self-attention in two, one word in all."""
    model = tiny_unet()
    call = unet_call(model, batch=4, text=LENGTH)
    theirs, switch = EagerEdit("refine", WEIGHTS, {2: 1.0}), ExitStack()

    def start(step: int) -> None:
        switch.close()
        edits: dict[int, Edit] = dict.fromkeys(CROSS, cross({3: theirs}, 2, step / 5))
        edits |= dict.fromkeys(SELF_4, injected([3], 2)) if step < 2 else {}
        switch.enter_context(editing(model, edits))

    expected = sample_ddim(model, call, 5, start)
    switch.close()
    with apply(model, PromptToPrompt(PromptEdit(REFINE, WEIGHTS, {2: 1.0}), count=5, self_resolution=4)):
        assert relative(sample_ddim(model, call, 5), expected) <= TOLERANCE
    assert relative(sample_ddim(model, call, 5), expected) > 1e-2


# LocalBlend

WORDS = ([1, 2], [3])


@dataclass
class EagerBlend:
    """Maps of the two conditional items' words, gathered over layers and steps."""

    maps: list[Tensor] = field(default_factory=list)

    def looking(self, edit: Edit) -> Edit:
        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prob = probabilities(q, k)[2:].mean(1)
            self.maps.append(torch.stack([prob[n][:, words].sum(-1) for n, words in enumerate(WORDS)]))
            return edit(q, k, v)

        return look

    def mask(self, threshold: float) -> Tensor:
        maps = torch.stack(self.maps).sum(0).unflatten(1, (4, 4))
        on = []
        for one in maps:
            padded = F.pad(one, (1, 1, 1, 1), value=-1.0)
            pooled = torch.stack([padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]).amax(0)
            on.append(pooled.repeat_interleave(2, 0).repeat_interleave(2, 1) / pooled.max() > threshold)
        return on[0] | on[1]


def guided(model, call: dict, steps: int, blend: Any, start: Any = int) -> Tensor:
    """Latents of the source and its edit after a run with guidance, blended after each step."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    latents = call["sample"][:1].repeat(2, 1, 1, 1)
    for i, t in enumerate(scheduler.timesteps):
        start(i)
        noise = run(model, call | {"sample": torch.cat([latents, latents]), "timestep": t})
        noise = noise[:2] + 3.0 * (noise[2:] - noise[:2])
        latents = blend(scheduler.step(noise, t, latents).prev_sample)  # type: ignore[arg-type, union-attr]
    return latents


def test_local_blend_of_a_run_matches_eager() -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4, text=LENGTH)
    eager, switch, masks = EagerBlend(), ExitStack(), []

    def start(step: int) -> None:
        switch.close()
        edit = cross({3: EagerEdit("refine")}, 2, step / 4)
        switch.enter_context(
            editing(model, dict.fromkeys(CROSS, edit) | dict.fromkeys(CROSS_4, eager.looking(edit)))
        )

    def blended(latents: Tensor) -> Tensor:
        masks.append(eager.mask(0.8))
        return torch.where(masks[-1], latents, latents[:1])

    expected = guided(model, call, 4, blended, start)
    switch.close()
    assert all(0 < int(mask.sum()) < 64 for mask in masks)
    blend = LocalBlend(WORDS, 0.8, 4)
    method = PromptToPrompt(PromptEdit(REFINE), self_share=0.0, count=4, blend=blend)
    for _ in range(2):  # a second run forgets the first one's maps
        with apply(model, method):
            assert relative(guided(model, call, 4, blend), expected) <= TOLERANCE
    with apply(model, method):
        assert relative(guided(model, call, 4, lambda latents: latents), expected) > 1e-2


def test_local_blend_keeps_the_source_outside_the_masks() -> None:
    """Outside of both masks an edit is the source, inside of either it is the edit."""
    model = tiny_unet()
    blend = LocalBlend(WORDS, 0.8, 8)
    with apply(model, PromptToPrompt(PromptEdit(REFINE), blend=blend)):
        run(model, unet_call(model, batch=4, text=LENGTH))
    masks, latents = blend.masks((16, 16)), torch.randn(2, 3, 16, 16)
    both = masks[0] | masks[1]
    assert 0 < int(both.sum()) < 256 and not torch.equal(masks[0], masks[1])
    out = blend(latents)
    assert torch.equal(out[0], latents[0])
    assert torch.allclose(out[1], torch.where(both, latents[1], latents[0]), atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"edits": PromptEdit(REPLACE)},
        {"edits": PromptEdit(REFINE, {1: 2.0})},
        {"edits": PromptEdit(REFINE, {}, {1: 0.2})},
        {"cross_share": 0.1},
        {"self_share": 0.1},
        {"self_resolution": 4},
        {"count": 12},
        {"items": EditRoles(0, 1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_knob_changes_the_output(change: dict) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4, text=LENGTH)
    method = PromptToPrompt(PromptEdit(REFINE))
    with apply(model, method) as handle:
        handle.set_step(10)
        before = run(model, call)
        handle.method = dataclasses.replace(method, **change)
        assert relative(run(model, call), before) > 1e-4


def test_neutral_knobs_are_plain_attention() -> None:
    """Shares of 0, and an item that edits itself."""
    model = tiny_unet()
    call = unet_call(model, batch=4, text=LENGTH)
    plain = run(model, call)
    none = PromptToPrompt(PromptEdit(REPLACE, WEIGHTS), cross_share=0.0, self_share=0.0)
    for method in (none, PromptToPrompt(PromptEdit(), items=EditRoles(3, 3))):
        with apply(model, method):
            assert relative(run(model, call), plain) <= TOLERANCE


def test_makes_no_attention_map() -> None:
    """No tensor is larger than in a plain call; the eager form shows that a map would be."""
    model = tiny_unet()
    call = unet_call(model, batch=4, side=(32, 32))
    with editing(model, {12: injected([3], 2)}):
        assert largest_tensor(model, call) >= 1024**2 * 16
    plain = largest_tensor(model, call)
    alignment = TokenAlignment(torch.eye(5), torch.tensor([1.0, 1, 0, 1, 1]))
    with apply(
        model, PromptToPrompt(PromptEdit(alignment), self_resolution=32, blend=LocalBlend(WORDS, 0.3, 32))
    ):
        assert largest_tensor(model, call) <= plain


def test_equal_knobs_share_one_plan() -> None:
    """A plan is reused while the same words count; it has one part where only the source's maps do."""
    method = PromptToPrompt(PromptEdit(REPLACE))
    layer = Layer(3, "cross", "up", 4, 8, LENGTH, 64, 4, (8, 8))
    plan = method.plan(layer, Step(0))
    assert plan is not None and len(plan.parts) == 1
    assert plan is method.plan(layer, Step(39)) and method.plan(layer, Step(40)) is None
    assert method.plan(layer, Step(40, 100)) is plan
    refined = PromptToPrompt(PromptEdit(REFINE)).plan(layer, Step(0))
    assert refined is not None and len(refined.parts) == 2


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"edits": ()}, r"^edits: "),
        ({"edits": REFINE}, r"^edits: "),
        ({"cross_share": 1.1}, r"^cross_share: "),
        ({"self_share": -0.1}, r"^self_share: "),
        ({"self_resolution": 0}, r"^self_resolution: "),
        ({"count": 1.5}, r"^count: "),
        ({"blend": 0.3}, r"^blend: "),
        ({"items": 3}, r"^items: "),
    ],
    ids=str,
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PromptToPrompt(**({"edits": PromptEdit()} | knob))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"alignment": SPLIT}, r"^alignment: "),
        ({"weights": {1: -1.0}}, r"^weights: "),
        ({"weights": {-1: 1.0}}, r"^weights: "),
        ({"shares": {1: 1.5}}, r"^shares: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_edit_raises(fields: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PromptEdit(**fields)


def test_wrong_blend_raises() -> None:
    for arguments, match in (
        (([1],), "^words: "),
        ((WORDS, 2.0), "^threshold: "),
        ((WORDS, 0.3, 0), "^resolution: "),
    ):
        with pytest.raises(ValueError, match=match):
            LocalBlend(*arguments)
    with pytest.raises(ValueError, match=r"^words: no cross-attention layer"):
        LocalBlend(WORDS)(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"^latents: expected one for each of 2"):
        LocalBlend(WORDS)(torch.zeros(3, 4, 8, 8))


def test_call_that_does_not_fit_raises() -> None:
    model, flux = tiny_unet(), tiny_flux()
    call = unet_call(model, batch=4, text=LENGTH)
    for method, match in (
        (PromptToPrompt([PromptEdit(), PromptEdit()]), "^edits: expected one for each of 1"),
        (
            PromptToPrompt(PromptEdit(TokenAlignment(torch.eye(5), torch.ones(5)))),
            "^alignment: expected one for 7",
        ),
        (PromptToPrompt(PromptEdit(weights={9: 2.0})), "^edits: .*text tokens below 7, got 9"),
    ):
        with apply(model, method), pytest.raises(ValueError, match=match):
            run(model, call)
    with apply(flux, PromptToPrompt(PromptEdit())), pytest.raises(ValueError, match="'double'"):
        flux_forward(flux, tiny_call(flux, batch=4))


def test_copied_and_pickled_edits_are_equal() -> None:
    edit = PromptEdit(weights={2: 3.0}, shares={1: 0.5})
    for twin in (
        copy.deepcopy(edit),
        pickle.loads(pickle.dumps(edit)),
        copy.deepcopy(PromptToPrompt([edit])).edits[0],
    ):
        assert dict(twin.weights) == {2: 3.0} and dict(twin.shares) == {1: 0.5} and twin.alignment is None

"""MasaCtrl against an eager implementation of its formulas."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import EditRoles, MasaCtrl, WordMaps
from flashbrush.integrations.diffusers import Layer, Step, apply

from ..diffusers.tiny_images import SDXL, tiny_unet, unet_call
from ..tiny import forward as flux_forward, relative, tiny_call, tiny_flux
from .eager import Edit, editing, largest_tensor, probabilities, run, sample_ddim, worst_edit

TOLERANCE = 1e-5  # float32, relative to the largest output
PAIRS = ((0, 1), (2, 3))  # [source, edit] without and with the prompt
TINY = {"layers": (3, None), "steps": (0, None)}
UP = (6, 8, 10, 12)  # self-attention on the way up, the tiny UNet's blocks 3 to 6
CROSS_4 = (3, 5, 7, 9)  # cross-attention of 4 x 4 tokens
WORDS = {-2: [1, 3], -1: [2]}


def resized(mask: Tensor, tokens: int) -> Tensor:
    """The mask on a square of tokens, (tokens,), by nearest neighbours"""
    side = math.isqrt(tokens)
    index = [torch.arange(side) * n // side for n in mask.shape]
    return mask[index[0]][:, index[1]].flatten()


def mutual(
    q: Tensor, k: Tensor, v: Tensor, pairs=PAIRS, masks: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    out = probabilities(q, k) @ v
    for source, target in pairs:
        logits = q[target] @ k[source].mT / math.sqrt(q.shape[-1])
        if masks is None or masks[0].all() or not masks[0].any():
            out[target] = torch.softmax(logits, -1) @ v[source]
            continue
        keys, rows = (resized(mask, q.shape[2]) for mask in masks)
        fg = torch.softmax(logits.masked_fill(~keys, -math.inf), -1) @ v[source]
        bg = torch.softmax(logits.masked_fill(keys, -math.inf), -1) @ v[source]
        out[target] = torch.where(rows[:, None], fg, bg)
    return out


def union(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = probabilities(q, k) @ v
    for source, target in PAIRS:
        both = [torch.cat([t[source], t[target]], 1) for t in (k, v)]
        out[target] = probabilities(q[target], both[0]) @ both[1]
    return out


@dataclass
class ByWords:
    """Masks of the cross-attention seen so far in the call."""

    threshold: float = 0.1
    maps: list[Tensor] = field(default_factory=list)

    def edits(self, layers=UP) -> dict[int, Edit]:
        return dict.fromkeys(CROSS_4, self.look) | dict.fromkeys(layers, self.read)

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prob = probabilities(q, k)
        self.maps.append(
            torch.stack([prob[item][:, :, tokens].mean(0).sum(-1) for item, tokens in WORDS.items()])
        )
        return prob @ v

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mutual(q, k, v, masks=self.masks())

    def masks(self) -> tuple[Tensor, Tensor] | None:
        if not self.maps:
            return None
        source, target = torch.stack(self.maps).mean(0)
        chosen = [(m - m.min()) / (m.max() - m.min()) >= self.threshold for m in (source, target)]
        return chosen[0].unflatten(0, (4, 4)), chosen[1].unflatten(0, (4, 4))


def some_masks(side: int = 8) -> tuple[Tensor, Tensor]:
    source, target = (torch.rand(2, side, side, generator=torch.Generator().manual_seed(3)) < 0.4).unbind()
    return source, target


FORMS = {
    "plain": ({}, mutual),
    "other layers": ({"layers": (2, 4)}, mutual),
    "one half": ({"items": EditRoles(3, 0)}, partial(mutual, pairs=((3, 0),))),
    "masks": ({"masks": some_masks()}, partial(mutual, masks=some_masks())),
    "larger masks": ({"masks": some_masks(32)}, partial(mutual, masks=some_masks(32))),
    "no rows in the mask": (
        {"masks": (some_masks()[0], torch.zeros(8, 8).bool())},
        partial(mutual, masks=(some_masks()[0], torch.zeros(8, 8).bool())),
    ),
    "union": ({"union": True}, union),
}


@pytest.mark.parametrize("form", FORMS)
def test_matches_eager(form: str) -> None:
    knobs, edit = FORMS[form]
    model = tiny_unet()
    call = unet_call(model, batch=4)
    edits = dict.fromkeys((4, 6) if "layers" in knobs else UP, edit)
    with editing(model, edits):
        expected = run(model, call)
    with apply(model, MasaCtrl(**(TINY | knobs))):
        out = run(model, call)
        assert worst_edit(model, call, edits) <= TOLERANCE
    assert relative(out, expected) <= TOLERANCE
    assert relative(out, run(model, call)) > 1e-2


@pytest.mark.parametrize("threshold", [0.1, 0.4])
@pytest.mark.parametrize("first", [3, 0], ids=["after the maps", "while they are made"])
def test_masks_from_words_match_eager(threshold: float, first: int) -> None:
    """Each layer has the masks of the maps that the same call has made so far."""
    model = tiny_unet()
    call = unet_call(model, batch=4)
    method = MasaCtrl(layers=(first, None), steps=(0, None), masks=WordMaps(WORDS, 4), threshold=threshold)
    layers = (0, 2, 4, *UP) if first == 0 else UP
    calls = [call | {"sample": scale * call["sample"]} for scale in (1.0, -0.5)]
    expected = []
    for changed in calls:
        with editing(model, (eager := ByWords(threshold)).edits(layers)):
            expected.append(run(model, changed))
        masks = eager.masks()
        assert masks is not None and 0 < int(masks[0].sum()) < 16 and not torch.equal(*masks)
    with apply(model, method):
        for changed, theirs in zip(calls, expected, strict=True):
            assert relative(run(model, changed), theirs) <= TOLERANCE
    with apply(model, MasaCtrl(layers=(first, None), steps=(0, None))):
        assert relative(run(model, calls[1]), expected[1]) > 1e-3


@pytest.mark.parametrize("words", [False, True], ids=["plain", "masks from words"])
def test_run_matches_eager(words: bool) -> None:
    """Four steps of DDIM, of which the method has all but the first."""
    model = tiny_unet()
    call = unet_call(model, batch=4)
    switch = ExitStack()

    def start(step: int) -> None:
        switch.close()
        if step >= 1:
            switch.enter_context(editing(model, ByWords().edits() if words else dict.fromkeys(UP, mutual)))

    expected = sample_ddim(model, call, 4, start)
    switch.close()
    with apply(
        model, MasaCtrl(layers=(3, None), steps=(1, None), masks=WordMaps(WORDS, 4) if words else None)
    ):
        assert relative(sample_ddim(model, call, 4), expected) <= TOLERANCE
    assert relative(sample_ddim(model, call, 4), expected) > 1e-2


def test_several_edits_on_sdxl_match_eager() -> None:
    model = tiny_unet(SDXL)
    call = unet_call(model, batch=6)
    edit = partial(mutual, pairs=((0, 1), (0, 2), (3, 4), (3, 5)), masks=some_masks())
    with editing(model, dict.fromkeys((8, 10, 12, 14), edit)):
        expected = run(model, call)
    with apply(model, MasaCtrl(layers=(4, None), steps=(0, None), masks=some_masks())):
        assert relative(run(model, call), expected) <= TOLERANCE


@pytest.mark.parametrize("full", [False, True])
def test_empty_or_full_source_mask_is_ignored(full: bool) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4)
    with apply(model, MasaCtrl(**TINY)) as handle:
        expected = run(model, call)
        handle.method = MasaCtrl(**TINY, masks=(torch.full((8, 8), full), some_masks()[1]))
        assert torch.equal(run(model, call), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": (5, None)},
        {"steps": (1, None)},
        {"masks": None},
        {"threshold": 0.4},
        {"items": EditRoles(0, 1)},
    ],
    ids=str,
)
def test_each_knob_changes_the_output(change: dict) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4)
    method = MasaCtrl(**TINY, masks=WordMaps(WORDS, 4))
    with apply(model, method) as handle:
        handle.set_step(0)
        before = run(model, call)
        for name, value in change.items():
            setattr(method, name, value)
        assert relative(run(model, call), before) > 1e-4


def test_edit_of_itself_is_plain_attention() -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4)
    with apply(model, MasaCtrl(**TINY, items=EditRoles(1, 1))):
        out = run(model, call)
    assert relative(out, run(model, call)) <= TOLERANCE


def test_default_layers_and_steps_are_the_released_ones() -> None:
    layers = [Layer(2 * block, "self", "up", 8, 40, 0, 64, 4, (8, 8)) for block in range(16)]
    method = MasaCtrl()
    assert [n for n, layer in enumerate(layers) if method.plan(layer, Step(4)) is not None] == list(
        range(10, 16)
    )
    assert [step for step in range(50) if method.plan(layers[10], Step(step)) is not None] == list(
        range(4, 50)
    )
    assert method.plan(layers[10], Step(4)) is method.plan(layers[11], Step(5))
    method.masks = some_masks()
    assert method.plan(layers[10], Step(4)) is method.plan(layers[11], Step(5))


def test_masked_branches_are_groups_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two branches are groups of one call, on keys sorted by the mask."""
    calls = []

    def spy(q, k, v, control=None, **options):
        calls.append((q, k, control))
        return fb.attention(q, k, v, control, **options)

    monkeypatch.setattr("flashbrush.integrations.diffusers.protocol.plan_call.attention", spy)
    model = tiny_unet()
    with apply(model, MasaCtrl(**TINY, masks=some_masks()), layers=6):
        run(model, unet_call(model, batch=4))
    ((q, k, control),) = [c for c in calls if c[2] is not None]
    assert q.shape[1] == k.shape[1] == control.keys.total == 16 and control.group_names == ("fg", "bg")


@pytest.mark.parametrize("form", ["plain", "masks", "union"])
def test_makes_no_attention_map(form: str) -> None:
    """No tensor is larger than in a plain call; the eager form shows that a map would be."""
    model = tiny_unet()
    call = unet_call(model, batch=4, side=(32, 32))
    knobs, edit = FORMS[form]
    with editing(model, {12: edit}):
        assert largest_tensor(model, call) >= 1024**2 * 16
    plain = largest_tensor(model, call)
    with apply(model, MasaCtrl(**(TINY | knobs))):
        assert largest_tensor(model, call) <= plain


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"layers": 3}, r"^layers: "),
        ({"steps": (3, 1)}, r"^steps: "),
        ({"masks": torch.ones(4, 4)}, r"^masks: "),
        ({"masks": (torch.ones(4, 4), torch.ones(4, 4))}, r"^masks: "),
        ({"masks": WordMaps({0: [1]})}, r"^masks: .*WordMaps of two items"),
        ({"threshold": 1.5}, r"^threshold: "),
        ({"union": 1}, r"^union: "),
        ({"items": ()}, r"^items: "),
    ],
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MasaCtrl(**knob)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([1, 2],), r"^words: expected \{item"),
        (({},), r"^words: "),
        (({"cat": [1]},), r"^words: .*'cat'"),
        (({0: []},), r"^words\[0\]: "),
        (({0: [-1]},), r"^words\[0\]: "),
        (({0: [1]}, 0), r"^resolution: "),
    ],
    ids=str,
)
def test_wrong_words_raise(arguments: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WordMaps(*arguments)


def test_call_that_does_not_fit_raises() -> None:
    model, flux = tiny_unet(), tiny_flux()
    call = unet_call(model, batch=4)
    for knobs, match in (
        ({"masks": WordMaps({-5: [1], -1: [1]}, 4)}, r"^words: .*items below 4"),
        ({"masks": WordMaps({-2: [1], -1: [9]}, 4)}, r"^words: .*tokens below 5"),
        ({"masks": some_masks(), "union": True}, r"^union: expected no masks"),
        ({"items": EditRoles(0, 5)}, r"items below the batch of 4"),
    ):
        with apply(model, MasaCtrl(**TINY, **knobs)), pytest.raises(ValueError, match=match):
            run(model, call)
    with apply(flux, MasaCtrl()), pytest.raises(ValueError, match="'double'"):
        flux_forward(flux, tiny_call(flux, batch=4))
    with pytest.raises(
        ValueError, match=r"^words: no cross-attention layer of resolution 16 has been seen yet"
    ):
        _ = WordMaps({0: [1]}).mean

"""OminiControl against an eager implementation that writes the bias token by token."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import OminiControl
from flashbrush.integrations.diffusers import Layer, Step, apply
from flashbrush.integrations.methods.omini_control import offset_ids

from ..tiny import COLUMNS, ROWS, TEXT, forward, relative, tiny_call, tiny_flux
from .eager import Site, attend, eagerly, sample_euler, worst_layer

TOLERANCE = 1e-5  # float32, relative to the largest output
IMAGE, CONDITIONS = 3 * COLUMNS, (8, 4)  # of the tiny call's 24 image tokens
TIMES = (0.8, 0.55, 0.3, 0.0)


class EagerOmini:
    """The first release's bias and the second's branches; `cache` keeps each layer's keys and values."""

    def __init__(self, lengths=(12,), strength=1.0, independent=False, cache: dict | None = None) -> None:
        self.lengths, self.strength, self.independent, self.cache = lengths, strength, independent, cache

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gamma = torch.tensor(self.strength).log().item()
        if self.cache is not None and site.index in self.cache:
            more_k, more_v = self.cache[site.index]
            bias = torch.zeros(k.shape[2] + more_k.shape[2])
            bias[k.shape[2] :] = gamma
            return attend(q, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), bias)
        tokens, conditions = k.shape[2], sum(self.lengths)
        branch = torch.zeros(tokens, dtype=torch.long)
        for n, (first, end) in enumerate(pairwise(accumulate(self.lengths, initial=tokens - conditions)), 1):
            branch[first:end] = n
        rows, keys = branch[:, None], branch[None]
        bias = torch.where((rows == 0) != (keys == 0), gamma, 0.0)
        bias[(rows > 0) & (keys > 0) & (rows != keys)] = -math.inf
        if self.independent or self.cache is not None:
            bias[(rows > 0) & (keys == 0)] = -math.inf
        if self.cache is not None:
            self.cache[site.index] = k[:, :, -conditions:], v[:, :, -conditions:]
        return attend(q, k, v, bias)


CASES = {
    "neutral, two conditions": (CONDITIONS, {}),
    "weaker": (12, {"strength": 0.4}),
    "stronger": (12, {"strength": 3}),
    "cut": (12, {"strength": 0}),
    "independent": (12, {"independent_condition": True, "strength": 1.5}),
    "two conditions, independent": (CONDITIONS, {"independent_condition": True, "strength": 0.7}),
}


def eager(tokens, knobs: dict, cache: dict | None = None) -> EagerOmini:
    lengths = (tokens,) if isinstance(tokens, int) else tokens
    strength, independent = knobs.get("strength", 1.0), knobs.get("independent_condition", False)
    return EagerOmini(lengths, strength, independent, cache)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_matches_eager(case: str) -> None:
    tokens, knobs = CASES[case]
    model = tiny_flux()
    call = tiny_call(model, batch=2)
    core = eager(tokens, knobs)
    with eagerly(model, core):
        expected = forward(model, call)
    with apply(model, OminiControl(tokens, **knobs)):
        assert worst_layer(model, call, core) <= TOLERANCE
        assert relative(forward(model, call), expected) <= TOLERANCE


def without(call: dict[str, Tensor]) -> dict[str, Tensor]:
    return call | {"hidden_states": call["hidden_states"][:, :IMAGE], "img_ids": call["img_ids"][:IMAGE]}


@pytest.mark.parametrize("case", ["weaker", "two conditions, independent"])
def test_run_matches_eager(case: str) -> None:
    tokens, knobs = CASES[case]
    model = tiny_flux()
    call = tiny_call(model)
    condition = call["hidden_states"][:, IMAGE:]

    def keep(step: int, latents: Tensor) -> Tensor:
        return torch.cat([latents[:, :IMAGE], condition], 1)

    def run() -> list[Tensor]:
        return list(sample_euler(model, call, call["hidden_states"], TIMES, keep))

    with eagerly(model, eager(tokens, knobs)):
        expected = run()
    with apply(model, OminiControl(tokens, **knobs)):
        assert relative(run()[-1], expected[-1]) <= TOLERANCE


@pytest.mark.parametrize(("tokens", "strength"), [(12, 1.0), (CONDITIONS, 1.0), (CONDITIONS, 0.6), (12, 0)])
def test_cached_run_matches_eager(tokens, strength: float) -> None:
    """Step 0 has the conditions; later steps read their kept keys."""
    model = tiny_flux()
    call = tiny_call(model)

    def run() -> Tensor:
        first = list(sample_euler(model, call, call["hidden_states"], TIMES[:2]))[-1]
        return list(sample_euler(model, without(call), first[:, :IMAGE], TIMES[1:]))[-1]

    kept: dict = {}
    core = eager(tokens, {"strength": strength}, kept)
    with eagerly(model, core):
        expected = run()
    with apply(model, method := OminiControl(tokens, strength, cached=True)) as handle:
        assert relative(run(), expected) <= TOLERANCE
        for index, (k, v) in method.kept.items():
            assert relative(k.transpose(1, 2), kept[index][0]) <= TOLERANCE
            assert relative(v.transpose(1, 2), kept[index][1]) <= TOLERANCE
        handle.set_step(3)
        assert worst_layer(model, without(call), core) <= TOLERANCE


def test_call_of_conditions_alone_keeps_the_same_keys() -> None:
    """The conditions depend on nothing else, so their call may have another time and a LoRA."""
    model = tiny_flux()
    call = tiny_call(model)
    alone = call | {"hidden_states": call["hidden_states"][:, IMAGE:], "img_ids": call["img_ids"][IMAGE:]}
    with apply(model, method := OminiControl(CONDITIONS, cached=True)) as handle:
        forward(model, call)
        expected = dict(method.kept)
        handle.reset()
        forward(model, alone)
        for index, pair in method.kept.items():
            assert all(relative(a, b) <= TOLERANCE for a, b in zip(pair, expected[index], strict=True))
        first = forward(model, without(call))
        handle.reset()
        forward(model, alone | {"timestep": torch.zeros(1)})
        assert relative(forward(model, without(call)), first) > 100 * TOLERANCE


def test_kept_keys_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(q, k, v, control=None, **options):
        assert q.shape[1] == TEXT + IMAGE
        seen.append(k[-1])
        return fb.attention(q, k, v, control, **options)

    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, method := OminiControl(12, cached=True)) as handle:
        forward(model, call)
        handle.set_step(1, 3)  # planned for the shapes of this call, not of the last
        monkeypatch.setattr("flashbrush.integrations.diffusers.protocol.plan_call.attention", spy)
        forward(model, without(call))
    assert [k.data_ptr() for k in seen] == [k.data_ptr() for k, _ in method.kept.values()]


@pytest.mark.parametrize(
    "knob",
    [
        {"strength": 1.1},
        {"strength": 0.0},
        {"independent_condition": True},
        {"cached": True},
        {"condition_tokens": (8, 4)},
        {"condition_tokens": 11},
    ],
    ids=str,
)
def test_each_knob_changes_the_output(knob: dict) -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, OminiControl(12, 0.9)) as handle:
        before = forward(model, call)
        handle.method = OminiControl(**{"condition_tokens": 12, "strength": 0.9} | knob)
        handle.reset()
        assert relative(forward(model, call), before) > 100 * TOLERANCE


def test_neutral_strength_is_plain_and_zero_drops_the_condition() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, OminiControl(12)):
        mine = forward(model, call)
    assert relative(mine, forward(model, call)) <= TOLERANCE
    with apply(model, OminiControl(12, 0)):
        mine = forward(model, call)[:, :IMAGE]
    assert relative(mine, forward(model, without(call))) <= TOLERANCE


def test_equal_knobs_share_one_control() -> None:
    layer = Layer(0, "double", None, 4, 32, TEXT, ROWS * COLUMNS)
    first = OminiControl(12, 0.5).plan(layer, Step(0)).control
    assert OminiControl((12,), 0.5).plan(layer, Step(3)).control is first
    assert OminiControl(12, 0.6).plan(layer, Step(0)).control is not first


def test_offset_ids_moves_rows_and_columns() -> None:
    ids = tiny_call(tiny_flux(double=1, single=1))["img_ids"]
    moved = offset_ids(ids, columns=32)
    assert torch.equal(moved[:, :2], ids[:, :2]) and torch.equal(moved[:, 2], ids[:, 2] + 32)
    assert torch.equal(offset_ids(ids, -2, 1) - ids, torch.tensor([0.0, -2, 1]).expand(24, 3))


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("condition_tokens", 0),
        ("condition_tokens", ()),
        ("condition_tokens", (3, -1)),
        ("condition_tokens", "3"),
        ("condition_tokens", True),
        ("condition_tokens", None),
        ("strength", -0.1),
        ("strength", math.inf),
        ("strength", math.nan),
        ("strength", "1"),
    ],
)
def test_wrong_knob_raises(knob: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{knob}: "):
        OminiControl(**{"condition_tokens": 12} | {knob: value})
    method = OminiControl(12)
    with pytest.raises(ValueError, match=f"^{knob}: "):
        setattr(method, knob, value)
    assert method == OminiControl(12)


@pytest.mark.parametrize(
    ("tokens", "step", "match"),
    [
        (25, 0, "^condition_tokens: they are 25, but the call has 24"),
        (12, 1, "^cached: nothing is kept for layer 0"),
    ],
)
def test_call_that_does_not_fit_raises(tokens: int, step: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        OminiControl(tokens, cached=True).plan(Layer(0, "double", None, 4, 32, TEXT, 24), Step(step))

"""In-Context Brush against an eager implementation of the paper and the released processor."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import InContextBrush
from flashbrush.integrations.diffusers import Layer, Step, apply

from ..tiny import TEXT, forward, relative, tiny_call, tiny_flux
from .eager import Site, eagerly, probabilities, run_eagerly, run_layers

TOLERANCE = 1e-5  # float32, relative to the largest output


@dataclasses.dataclass
class EagerBrush:
    """The released processor's arithmetic: A o W, then V, then the gain.

    `prompt` counts each item's prompt tokens; `subject` is the subject panel's slice of the joint sequence,
    `target` that of the shifted rows, or for each item their indices.
    """

    prompt: list[int]
    subject: slice
    target: slice | list[Tensor]
    alpha_prompt: float = 0.3
    alpha_subject: float = 0.3
    gain_span: float = 0.2
    gain_floor: float = 1.0
    gain_norm: str = "minmax"
    gain_rows: str = "*"
    constant_gain: bool = False  # no gradient through it

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prob, out = probabilities(q, k), []
        for item, prompt in zip(prob, self.prompt, strict=True):  # (heads, rows, keys)
            target = self.target if isinstance(self.target, slice) else self.target[len(out)]
            weight = torch.ones_like(item)
            if site.name.startswith("transformer_blocks"):
                weight[:, target, :prompt] = 1 + self.alpha_prompt
                weight[:, target, self.subject] = 1 + self.alpha_subject
            mass = item[:, target, :prompt].sum((1, 2))
            mass = mass.detach() if self.constant_gain else mass
            gain = self.gain_floor + self.gain_span * self.norm(mass, item[0, target].shape[0])
            rows = (item * weight) @ v[len(out)]
            scaled = gain[:, None, None] * rows
            if self.gain_rows == "target":
                rows[:, target] = scaled[:, target]
                scaled = rows
            out.append(scaled)
        return torch.stack(out)

    def norm(self, mass: Tensor, rows: int) -> Tensor:
        if self.gain_norm == "minmax":
            return (mass - mass.min()) / (mass.max() - mass.min() + torch.finfo(mass.dtype).eps)
        if self.gain_norm == "mean":
            return mass / mass.mean()
        if self.gain_norm == "max":
            return mass / mass.max()
        return len(mass) * torch.softmax(mass / rows, 0)


END = TEXT + 24
HOLES = torch.zeros(2, 24, dtype=torch.bool)
HOLES[0, [13, 14, 18, 19, 23]], HOLES[1, [12, 20, 21]] = True, True
HOLES[:, 3] = True  # of the subject's panel, which is never painted
PAINTED = [TEXT + 12 + hole[12:].nonzero()[:, 0] for hole in HOLES]
HALVES = {"prompt": [TEXT] * 2, "subject": slice(TEXT, TEXT + 12), "target": slice(TEXT + 12, END)}
CASES = {
    "released": ({}, HALVES),
    "paper rows": ({"gain_rows": "target"}, HALVES | {"gain_rows": "target"}),
    "other knobs": (
        {"alpha_prompt": 0.9, "alpha_subject": -0.4, "gain_span": 0.7, "gain_floor": 0.6},
        HALVES | {"alpha_prompt": 0.9, "alpha_subject": -0.4, "gain_span": 0.7, "gain_floor": 0.6},
    ),
    "mean": ({"gain_norm": "mean"}, HALVES | {"gain_norm": "mean"}),
    "max": ({"gain_norm": "max"}, HALVES | {"gain_norm": "max"}),
    "softmax": ({"gain_norm": "softmax"}, HALVES | {"gain_norm": "softmax"}),
    "subject last": (
        {"subject_first": False},
        HALVES | {"subject": slice(END - 12, END), "target": slice(TEXT, END - 12)},
    ),
    "small subject": (
        {"subject_tokens": 5},
        HALVES | {"subject": slice(TEXT, TEXT + 5), "target": slice(TEXT + 5, END)},
    ),
    "hole": ({"hole": HOLES}, HALVES | {"target": PAINTED}),
    "hole, paper rows": (
        {"hole": HOLES, "gain_rows": "target"},
        HALVES | {"target": PAINTED, "gain_rows": "target"},
    ),
    "one hole, subject last": (
        {"hole": HOLES[0].flip(0), "subject_first": False},
        HALVES | {"subject": slice(END - 12, END), "target": [END - 1 - (PAINTED[0] - TEXT)] * 2},
    ),
    "hole, without padding, by item": (
        {"hole": HOLES, "count_padding": False, "prompt_tokens": torch.tensor([3, 6])},
        HALVES | {"prompt": [3, 6], "target": PAINTED},
    ),
    "without padding": ({"count_padding": False, "prompt_tokens": 4}, HALVES | {"prompt": [4, 4]}),
    "without padding, by item": (
        {"count_padding": False, "prompt_tokens": torch.tensor([3, 6])},
        HALVES | {"prompt": [3, 6]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_matches_eager(case: str) -> None:
    knobs, eager = CASES[case]
    model = tiny_flux()
    call = tiny_call(model, batch=2)
    with eagerly(model, EagerBrush(**eager)):
        expected, expected_blocks = run_layers(model, call)
    with apply(model, InContextBrush(**knobs)):
        out, blocks = run_layers(model, call)
    assert len(blocks) == len(expected_blocks) == 2 * 2 + 2
    for mine, theirs in zip(blocks, expected_blocks, strict=True):
        assert relative(mine, theirs) <= TOLERANCE
    assert relative(out, expected) <= TOLERANCE


def test_neutral_eager_is_the_stock_model() -> None:
    model = tiny_flux()
    call = tiny_call(model, batch=2)
    core = EagerBrush(**HALVES, alpha_prompt=0.0, alpha_subject=0.0, gain_span=0.0)
    neutral = run_eagerly(model, call, core)
    assert relative(neutral, forward(model, call)) <= TOLERANCE


def test_gradients_match_eager_with_constant_gain() -> None:
    model = tiny_flux(double=1, single=1)
    gradients = []
    for install in ("eager", "ours", "checkpointed"):
        call = tiny_call(model)
        call["hidden_states"].requires_grad_()
        model.train(install == "checkpointed")
        if install == "checkpointed":
            model.enable_gradient_checkpointing()
        core = EagerBrush(**HALVES | {"prompt": [TEXT]}, constant_gain=True)
        with eagerly(model, core) if install == "eager" else apply(model, InContextBrush()):
            model(**call).sample.square().sum().backward()
        gradients.append(call["hidden_states"].grad)
    assert relative(gradients[1], gradients[0]) <= 1e-4
    assert relative(gradients[2], gradients[0]) <= 1e-4


@pytest.mark.parametrize(
    "knob",
    [
        {"alpha_prompt": 0.35},
        {"alpha_subject": 0.35},
        {"gain_span": 0.3},
        {"gain_floor": 1.1},
        {"gain_norm": "mean"},
        {"gain_norm": "max"},
        {"gain_norm": "softmax"},
        {"gain_rows": "target"},
        {"count_padding": False, "prompt_tokens": 3},
        {"subject_first": False},
        {"subject_tokens": 10},
    ],
    ids=str,
)
def test_each_knob_changes_the_output(knob: dict) -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, InContextBrush()) as handle:
        before = forward(model, call)
        handle.method = InContextBrush(**knob)
        after = forward(model, call)
    assert relative(after, before) > 100 * TOLERANCE


def test_neutral_knobs_are_plain_attention() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    plain = forward(model, call)
    with apply(model, InContextBrush(alpha_prompt=0, alpha_subject=0, gain_span=0)):
        assert relative(forward(model, call), plain) <= TOLERANCE
    with apply(model, InContextBrush()):
        assert relative(forward(model, call), plain) > 100 * TOLERANCE


def test_knob_set_between_steps_applies_to_the_next_call() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    method = InContextBrush()
    with apply(model, method) as handle:
        first = forward(model, call)
        method.alpha_subject = 0.8
        second = forward(model, call)
        handle.method = InContextBrush(alpha_subject=0.8)
        assert torch.equal(forward(model, call), second)
        method.alpha_subject = 0.3
        handle.method = method
        assert torch.equal(forward(model, call), first)
    assert not torch.equal(first, second)


def test_equal_knobs_share_one_control() -> None:
    def control(method: InContextBrush, kind: str) -> fb.Control:
        planned = method.plan(Layer(0, kind, None, 4, 32, 7, 24), Step(0)).control
        assert planned is not None
        return planned

    method = InContextBrush()
    first = control(method, "double")
    assert control(InContextBrush(), "double") is first
    assert control(method, "single") is not first
    assert control(method, "single").weight is None
    method.gain_span = 0.5
    assert control(method, "double") is not first


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("alpha_prompt", -1.5),
        ("alpha_subject", math.nan),
        ("alpha_subject", "0.3"),
        ("gain_span", math.inf),
        ("gain_floor", -math.inf),
        ("gain_floor", None),
        ("gain_norm", "min"),
        ("gain_rows", "prompt"),
        ("count_padding", 1),
        ("subject_tokens", -1),
        ("prompt_tokens", "four"),
        ("prompt_tokens", [3, 3.5]),
        ("hole", torch.ones(24)),
    ],
)
def test_wrong_knob_raises(knob: str, value) -> None:
    with pytest.raises(ValueError, match=knob):
        InContextBrush(**{knob: value})
    method = InContextBrush()
    with pytest.raises(ValueError, match=knob):
        setattr(method, knob, value)
    assert method == InContextBrush()


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"subject_tokens": 25}, "subject_tokens"),
        ({"count_padding": False}, "prompt_tokens"),
        ({"count_padding": False, "prompt_tokens": 8}, "prompt_tokens"),
        ({"count_padding": False, "prompt_tokens": [3, 4]}, r"\[2\] items"),
    ],
)
def test_call_that_does_not_fit_raises(knobs: dict, match: str) -> None:
    model = tiny_flux(double=1, single=1)
    with apply(model, InContextBrush(**knobs)), pytest.raises(ValueError, match=match):
        forward(model, tiny_call(model))


def test_odd_image_without_subject_tokens_raises() -> None:
    with pytest.raises(ValueError, match="subject_tokens"):
        InContextBrush().plan(Layer(0, "double", None, 4, 32, 7, 25), Step(0))

"""compose(): joined plans against one attention with both methods' per-token tables written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import InContextBrush
from flashbrush.integrations.diffusers import Layer, Part, Plan, Step, apply, compose
from flashbrush.integrations.diffusers.protocol.plan import LatePlan
from flashbrush.integrations.diffusers.protocol.plan_call import PlanCall

from ...tiny import forward, relative, tiny_call, tiny_flux

BATCH, TEXT, IMAGE, HEADS, DIM = 2, 5, 8, 2, 8
TOKENS = TEXT + IMAGE
LAYER = Layer(3, "joint", None, HEADS, DIM, TEXT, IMAGE, BATCH)
TOLERANCE = 3e-6


class Fixed:
    """A method that always returns the same."""

    def __init__(self, plan: Plan | LatePlan | None) -> None:
        self.answer = plan

    def plan(self, layer: Layer, step: Step) -> Plan | LatePlan | None:
        return self.answer


class Other(Fixed): ...


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, BATCH, TOKENS, HEADS, DIM, generator=generator).unbind(0)
    return q, k, v


def joined(a: Plan, b: Plan) -> Tensor:
    plan = compose(Fixed(a), Other(b)).plan(LAYER, Step(0))
    assert isinstance(plan, Plan)
    plan.check(LAYER)
    q, k, v = inputs()
    return PlanCall(plan).attend(q, k, v)


def logits(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("nrhd,nkhd->nhrk", q, k) / math.sqrt(DIM)


def values(prob: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("nhrk,nkhd->nrhd", prob, v)


def extra(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, n, HEADS, DIM, generator=generator).unbind(0)
    return k, v


def test_tables_on_different_segments_match_eager() -> None:
    """One splits the text from the image, the other the image: bias adds up, weights and gains multiply."""
    a = fb.Control(
        fb.Segments(text=TEXT, image=IMAGE),
        bias={("image", "text"): 0.7, ("text", "image"): -math.inf},
        weight={("image", "text"): torch.tensor([1.5, 0.5])},
        gain={"image": 0.8},
    )
    b = fb.Control(
        fb.Segments(first=TEXT + 3, second=IMAGE - 3),
        bias={("second", "first"): -0.4},
        weight={("second", "first"): 2.0},
        gain={"second": 1.1, "first": 0.9},
    )
    q, k, v = inputs()
    text, first = torch.arange(TOKENS) < TEXT, torch.arange(TOKENS) < TEXT + 3
    bias = torch.zeros(TOKENS, TOKENS)
    bias[~text[:, None] & text] += 0.7
    bias[text[:, None] & ~text] = -math.inf
    bias[~first[:, None] & first] -= 0.4
    weight = torch.ones(HEADS, TOKENS, TOKENS)
    for h, w in enumerate((1.5, 0.5)):
        weight[h][~text[:, None] & text] *= w
        weight[h][~first[:, None] & first] *= 2
    gain = torch.where(text, 1.0, 0.8) * torch.where(first, 0.9, 1.1)
    expected = values(torch.softmax(logits(q, k) + bias, -1) * weight, v) * gain[:, None, None]
    assert relative(joined(Plan(a), Plan(b)), expected) <= TOLERANCE
    assert relative(joined(Plan(b), Plan(a)), expected) <= TOLERANCE


@pytest.mark.parametrize("turned", [False, True])
def test_groups_of_one_and_extra_keys_of_the_other_match_eager(turned: bool) -> None:
    """Regions with a softmax each, and adapters' keys with theirs, of one name in both."""
    gate, mask = torch.rand(BATCH, TOKENS), torch.rand(1, TOKENS)
    split = fb.Control(
        fb.Segments(rows=TOKENS),
        fb.Segments(one=6, two=TOKENS - 6),
        groups={"one": ["one"], "two": ["two"]},
        gates={"one": gate},
    )
    (k1, v1), (k2, v2) = extra(3, 1), extra(4, 2)

    def adapter(n: int, gates: dict[str, Any]) -> fb.Control:
        return fb.Control(
            fb.Segments(rows=TOKENS),
            fb.Segments(own=TOKENS, ip=n),
            groups={"own": ["own"], "ip": ["ip"]},
            gates=gates,
        )

    first = Plan(adapter(3, {"ip": 0.6}), extra={"ip": (k1, v1)})
    second = Plan(adapter(4, {"ip": mask}), extra={"ip": (k2, v2)})
    methods = [Fixed(Plan(split)), Other(first), Fixed(second)]
    plan = compose(*(reversed(methods) if turned else methods)).plan(LAYER, Step(0))
    assert isinstance(plan, Plan) and plan.control is not None and len(plan.control.group_names) == 4
    plan.check(LAYER)
    q, k, v = inputs()
    mine = PlanCall(plan).attend(q, k, v)
    expected = gate[..., None, None] * values(torch.softmax(logits(q, k[:, :6]), -1), v[:, :6])
    expected += values(torch.softmax(logits(q, k[:, 6:]), -1), v[:, 6:])
    expected += 0.6 * values(
        torch.softmax(logits(q, k1.expand(BATCH, -1, -1, -1)), -1), v1.expand(BATCH, -1, -1, -1)
    )
    ip = values(torch.softmax(logits(q, k2.expand(BATCH, -1, -1, -1)), -1), v2.expand(BATCH, -1, -1, -1))
    assert relative(mine, expected + mask[..., None, None] * ip) <= TOLERANCE


def test_registers_join_the_softmax_of_the_layer_s_keys() -> None:
    registers = extra(3, 1)
    a = Plan(
        fb.Control(fb.Segments(rows=TOKENS), fb.Segments(own=TOKENS, register=3)),
        extra={"register": registers},
    )
    b = Plan(fb.Control(fb.Segments(text=TEXT, image=IMAGE), weight={("image", "text"): 1.3}))
    q, k, v = inputs()
    k, v = (torch.cat([t, e.expand(BATCH, -1, -1, -1)], 1) for t, e in ((k, registers[0]), (v, registers[1])))
    weight = torch.ones(TOKENS, TOKENS + 3)
    weight[TEXT:, :TEXT] = 1.3
    expected = values(torch.softmax(logits(q, k), -1) * weight, v)
    assert relative(joined(a, b), expected) <= TOLERANCE
    assert relative(joined(b, a), expected) <= TOLERANCE


def test_gates_are_sorted_by_the_other_method_s_order() -> None:
    labels = torch.arange(TOKENS) % 2
    segments, order, _ = fb.Segments.from_labels(labels, ["even", "odd"])
    gate = torch.rand(1, TOKENS)
    k1, v1 = extra(3, 1)
    a = Plan(fb.Control(segments, bias={("odd", "even"): -math.inf}), order=order)
    control = fb.Control(
        fb.Segments(rows=TOKENS),
        fb.Segments(own=TOKENS, ip=3),
        groups={"own": ["own"], "ip": ["ip"]},
        gates={"ip": gate},
    )
    b = Plan(control, extra={"ip": (k1, v1)})
    q, k, v = inputs()
    cut = torch.zeros(TOKENS, TOKENS)
    cut[(labels == 1)[:, None] & (labels == 0)] = -math.inf
    expected = values(torch.softmax(logits(q, k) + cut, -1), v)
    ip = values(torch.softmax(logits(q, k1.expand(BATCH, -1, -1, -1)), -1), v1.expand(BATCH, -1, -1, -1))
    expected = expected + gate[..., None, None] * ip
    assert relative(joined(a, b), expected) <= TOLERANCE
    assert relative(joined(b, a), expected) <= TOLERANCE


def test_tables_act_on_the_items_outside_of_the_other_method_s_parts() -> None:
    control = fb.Control(fb.Segments(text=TEXT, image=IMAGE), weight={("image", "text"): 1.3})
    out = joined(Plan(control), Plan(parts=[Part((1,), attend=lambda q, k, v, backend: v)]))
    q, k, v = inputs()
    weight = torch.ones(TOKENS, TOKENS)
    weight[TEXT:, :TEXT] = 1.3
    assert relative(out[0], values(torch.softmax(logits(q, k), -1) * weight, v)[0]) <= TOLERANCE
    assert torch.equal(out[1], v[1])


def test_transforms_chain_offsets_add_and_every_see_is_called() -> None:
    q, k, v = inputs()
    seen: list[str] = []
    a = Plan(query=lambda x: 2 * x, q_offset=torch.ones(1), see=lambda _: seen.append("a"))
    b = Plan(
        query=lambda x: x + 1,
        value=lambda x: -x,
        q_offset=torch.ones(1),
        see=lambda _: seen.append("b"),
        scale=0.3,
    )
    plan = compose(Fixed(a), Other(b)).plan(LAYER, Step(0))
    assert isinstance(plan, Plan) and torch.equal(plan.q_offset, torch.full((1,), 2.0))
    out = PlanCall(plan).attend(q, k, v)
    expected = values(torch.softmax(0.3 * torch.einsum("nrhd,nkhd->nhrk", 2 * q + 1, k), -1), -v)
    assert relative(out, expected) <= TOLERANCE and seen == ["a", "b"]


def test_a_method_without_a_plan_leaves_the_other_s() -> None:
    plan = Plan(scale=0.3)
    assert compose(Fixed(None), Other(plan)).plan(LAYER, Step(0)) is plan
    assert compose(Fixed(None), Other(None)).plan(LAYER, Step(0)) is None


def test_a_late_plan_is_joined_when_its_layer_is_reached() -> None:
    asked: list[str] = []

    def late() -> Plan:
        asked.append("late")
        return Plan(scale=0.3)

    plan = compose(Fixed(late), Other(Plan(query=torch.zeros_like)), Other(None)).plan(LAYER, Step(0))
    assert callable(plan) and not asked
    made = plan()
    assert made is not None and made.scale == 0.3 and made.query is torch.zeros_like and asked == ["late"]
    none = compose(Fixed(lambda: None), Other(None)).plan(LAYER, Step(0))
    assert callable(none) and none() is None


def test_the_same_plans_give_the_same_joined_plan() -> None:
    """So that its tables stay on the device."""
    a, b = (
        Plan(scale=0.3),
        Plan(fb.Control(fb.Segments(text=TEXT, image=IMAGE), bias={("text", "image"): 1.0})),
    )
    both = compose(Fixed(a), Other(b))
    assert both.plan(LAYER, Step(0)) is both.plan(LAYER, Step(1))


SPLIT = fb.Control(
    fb.Segments(rows=TOKENS), fb.Segments(one=6, two=TOKENS - 6), groups={"one": ["one"], "two": ["two"]}
)
SORTED = Plan(fb.Control(fb.Segments(text=TEXT, image=IMAGE)), order=torch.arange(TOKENS).flip(0))
GAIN = fb.Control(fb.Segments(text=TEXT, image=IMAGE), head_gain=fb.HeadGain("image", "text"))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (Plan(scale=0.3), Plan(scale=0.4), "both have a scale"),
        (Plan(parts=[Part((0,))]), Plan(parts=[Part((0, 1))]), r"both have parts for the items \[0\]"),
        (SORTED, Plan(parts=[Part((0,))]), "one sorts the tokens of all items, the other has parts"),
        (Plan(SPLIT), Plan(SPLIT), "both split the layer's keys into softmax groups"),
        (
            SORTED,
            Plan(fb.Control(fb.Segments(text=TEXT, image=IMAGE))),
            "one sorts the tokens, the other has segments",
        ),
        (Plan(GAIN), Plan(GAIN), "both derive a gain"),
        (
            Plan(SPLIT),
            Plan(
                fb.Control(fb.Segments(rows=TOKENS), fb.Segments(own=TOKENS, more=3)),
                extra={"more": extra(3, 1)},
            ),
            "one adds keys to the softmax that the other splits",
        ),
        (
            Plan(fb.Control(fb.Segments(t=TOKENS), contrast=fb.Contrast())),
            Plan(fb.Control(fb.Segments(t=TOKENS), contrast=fb.Contrast(1.2))),
            "both contrast the same softmax",
        ),
        (
            Plan(fb.Control(fb.Segments(t=TOKENS), weight={("t", "t"): torch.ones(2, 1)})),
            Plan(parts=[Part((0,))]),
            "tables for each of its items",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_conflicting_plans_raise_with_the_reason(a: Plan, b: Plan, reason: str) -> None:
    with pytest.raises(ValueError, match=f"Fixed and Other cannot be joined in layer 3 .joint.: .*{reason}"):
        compose(Fixed(a), Other(b)).plan(LAYER, Step(0))


def test_anything_but_methods_raises() -> None:
    for wrong in ((), (InContextBrush,), (InContextBrush(), 3)):
        with pytest.raises(TypeError, match="methods: expected objects with plan"):
            compose(*wrong)  # type: ignore[arg-type]


def test_a_head_gain_follows_its_segments() -> None:
    """In-Context Brush with tables that split its panels."""
    model = tiny_flux(double=1, single=1)
    call = tiny_call(model)
    brush = InContextBrush()
    text, image = call["encoder_hidden_states"].shape[1], call["hidden_states"].shape[1]
    pieces = fb.Segments(a=3, b=text + image - 3)
    neutral = Other(Plan(fb.Control(pieces, bias={("a", "b"): 0.0})))
    with apply(model, brush):
        alone = forward(model, call)
    with apply(model, compose(brush, neutral)):
        assert relative(forward(model, call), alone) <= 1e-5
    with apply(model, compose(brush, Other(Plan(fb.Control(pieces, bias={("a", "b"): 1.0}))))):
        assert relative(forward(model, call), alone) > 1e-3

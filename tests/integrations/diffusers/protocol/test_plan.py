"""Plan: fields that are refused, and plans that a method makes late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations.diffusers import Layer, Plan, Seen, Step, apply

from ...tiny import relative
from ..tiny_images import tiny_unet, unet_call

TEXT, IMAGE, HEADS, DIM = 7, 24, 4, 32
TOKENS = TEXT + IMAGE
LAYER = Layer(0, "double", None, HEADS, DIM, TEXT, IMAGE, 2)
TOLERANCE = 2e-6  # float32, relative to the largest output
PAIR = (torch.zeros(1, 4, HEADS, DIM), torch.zeros(1, 4, HEADS, DIM))


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"control": "weight"}, TypeError, r"Plan\.control"),
        ({"source": {"keys": torch.tensor([0])}}, ValueError, r"Plan\.source"),
        ({"source": {"k": [0]}}, TypeError, r"Plan\.source"),
        ({"extra": {"r": PAIR}}, ValueError, r"Plan\.extra"),
        ({"extra": {"r": PAIR}, "control": fb.Control(fb.Segments(all=TOKENS))}, ValueError, "all"),
        (
            {
                "extra": {"r": PAIR[0]},
                "control": fb.Control(fb.Segments(all=TOKENS), fb.Segments(all=TOKENS, r=4)),
            },
            TypeError,
            "pair",
        ),
        ({"q_offset": 1.0}, TypeError, r"Plan\.q_offset"),
        ({"k_offset": [1.0]}, TypeError, r"Plan\.k_offset"),
        ({"query": torch.zeros(1)}, TypeError, r"Plan\.query"),
        ({"order": [1, 0]}, TypeError, r"Plan\.order"),
        (
            {"order": torch.zeros(2, 3).long(), "source": {"q": torch.tensor([0, 1])}},
            ValueError,
            r"Plan\.order",
        ),
        ({"value": 2}, TypeError, r"Plan\.value"),
    ],
)
def test_malformed_plans_raise(fields: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Plan(**fields)


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (Plan(order=torch.arange(TOKENS - 1)), r"Plan\.order: .*shape"),
        (Plan(fb.Control(fb.Segments(all=TOKENS + 1))), r"Plan\.control\.rows: 32 tokens for layer 0"),
        (Plan(q_offset=torch.zeros(TOKENS - 1, 1, 1)), r"Plan\.q_offset: expected a shape broadcastable"),
        (Plan(source={"k": torch.tensor([0, 1, 1])}), r"Plan\.source\['k'\]: expected shape \(2,\)"),
    ],
    ids=["order", "control", "q_offset", "source"],
)
def test_plans_that_do_not_fit_the_layer_raise(plan: Plan, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan.check(LAYER)


def test_extra_keys_that_are_no_pair_or_function_raise() -> None:
    control = fb.Control(fb.Segments(tokens=TOKENS), fb.Segments(tokens=TOKENS, copies=3))
    with pytest.raises(
        TypeError, match=r"Plan\.extra\['copies'\]: expected a pair .* or a callable, got list"
    ):
        Plan(control, extra={"copies": [torch.ones(3)]})  # type: ignore[dict-item]


# Late plans


class Late:
    """A method whose second self-attention follows what its first one saw in the same call."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong, self.scale = wrong, 0.0

    def plan(self, layer: Layer, step: Step) -> Plan | Callable[[], Plan | None] | None:
        if layer.kind != "self":
            return None
        return (
            Plan(see=self.see)
            if layer.index == 0
            else (lambda: self.decide(layer))
            if layer.index == 2
            else None
        )

    def see(self, seen: Seen) -> None:
        self.scale = float(seen.q.detach().abs().mean())

    def decide(self, layer: Layer) -> Plan | None:
        return Plan(scale=torch.ones(7)) if self.wrong else Plan(scale=self.scale)


def test_a_late_plan_is_made_when_its_layer_is_reached() -> None:
    model = tiny_unet()
    call, method = unet_call(model), Late()
    layers: Any = model.down_blocks
    first, second = (block.attentions[0].transformer_blocks[0].attn1 for block in layers)
    seen: dict[str, Tensor] = {}
    first.to_q.register_forward_hook(lambda module, args, output: seen.update(q=output))
    second.register_forward_hook(lambda module, args, output: seen.update(x=args[0], out=output))
    with apply(model, method), torch.no_grad():
        for scale in (1.0, 2.0):
            model(**(call | {"sample": scale * call["sample"]}))
            assert method.scale == pytest.approx(float(seen["q"].abs().mean()))
            q, k, v = (
                f(seen["x"]).unflatten(-1, (second.heads, -1))
                for f in (second.to_q, second.to_k, second.to_v)
            )
            prob = torch.softmax(torch.einsum("nrhd,nkhd->nhrk", q, k) * method.scale, -1)
            expected = second.to_out[0](torch.einsum("nhrk,nkhd->nrhd", prob, v).flatten(2))
            assert relative(seen["out"], expected) <= TOLERANCE


def test_a_late_plan_is_checked() -> None:
    model = tiny_unet()
    with apply(model, Late(wrong=True)), pytest.raises(ValueError, match="scale"):
        model(**unet_call(model))

"""Part: fields that are refused, alone and for a layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flashbrush.integrations.diffusers import Layer, Part, Plan

ROWS, KEYS = 12, 9
LAYER = Layer(0, "cross", "up", heads=2, head_dim=8, text_len=KEYS, image_len=ROWS, batch=4)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"items": (1,), "gate": math.nan}, "gate: expected a finite number"),
        ({"items": (1,), "key_order": torch.zeros(3)}, "key_order: expected an int64"),
        ({"items": (1,), "attend": 2}, "attend: expected a callable"),
        ({"items": (1,), "attend": abs, "scale": 0.5}, "attend: expected no control, scale,"),
        ({"items": (1,), "value": 3}, "value: expected a callable"),
        (
            {"items": (1,), "extra": {"more": (torch.zeros(1), torch.zeros(1))}},
            "extra: 'more' is no key segment",
        ),
        (
            {
                "items": (1,),
                "source": {"k": [torch.tensor([0])] * 2, "v": [torch.tensor([0])] * 2},
                "value": abs,
            },
            "one index of k and v together with value",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_malformed_parts_raise(fields: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        Part(**fields)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (Part((1,), key_order=torch.arange(KEYS + 1)), "Part.key_order: expected a shape"),
        (Part((1,), gate=torch.ones(1, ROWS + 1)), "Part.gate: expected a shape"),
    ],
    ids=["key_order", "gate"],
)
def test_parts_that_do_not_fit_the_layer_raise(part: Part, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Plan(parts=[part]).check(LAYER)

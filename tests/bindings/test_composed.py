"""The composed backend against float64 of the reference."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from support.problems import Call, calls, check

# A scale per item or head is multiplied into q, which rounds it to the dtype.
SCALE_ROUNDING = 2e-2


@settings(max_examples=500)
@given(calls(clip=False))
def test_drawn_calls(call: Call) -> None:
    out, stats = call.run("composed", return_stats=True)
    check(call, out, stats, SCALE_ROUNDING)


@settings(max_examples=100)
@given(calls(contrast=False, mask=True, dtypes=(torch.float32, torch.bfloat16)))
def test_dense_masks(call: Call) -> None:
    out, stats = call.run("composed", return_stats=True)
    check(call, out, stats, SCALE_ROUNDING)

"""The composed backend against float64 of the reference."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from support.problems import Call, calls, check


@settings(max_examples=500)
@given(calls(clip=False))
def test_drawn_calls(call: Call) -> None:
    out, stats = call.run("composed", return_stats=True)
    check(call, out, stats)


@settings(max_examples=100)
@given(calls(contrast=False, mask=True, dtypes=(torch.float32, torch.bfloat16)))
def test_dense_masks(call: Call) -> None:
    out, stats = call.run("composed", return_stats=True)
    check(call, out, stats)

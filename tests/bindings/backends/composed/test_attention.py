"""The composed backend: its error against float64, and how many vendor calls it makes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

import flashbrush as fb
from flashbrush.bindings.backends.composed import vendor_sdpa as sdpa
from support.calls import Call, examples, random_calls
from support.error_bars import check_result

# Of statistics in 16 bits: a scale per item or head is multiplied into q, which rounds it to the dtype.
SCALE_ROUNDING = 2e-2


@settings(max_examples=examples(500))
@given(random_calls(clip=False))
def test_random_calls_meet_the_error_bar(call: Call) -> None:
    out, stats = call.run("composed", return_stats=True)
    check_result(call, out, stats, SCALE_ROUNDING)


@settings(max_examples=examples(100))
@given(random_calls(contrast=False, mask=True, dtypes=(torch.float32, torch.bfloat16)))
def test_random_calls_with_dense_masks_meet_the_error_bar(call: Call) -> None:
    out, stats = call.run("composed", return_stats=True)
    check_result(call, out, stats, SCALE_ROUNDING)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Neighbouring key segments with the same table entries are one call; tables never split the rows.
        ({}, [(60, 60)]),
        ({"weight": {("*", "*"): 0.5}}, [(60, 60)]),
        ({"weight": {("*", "c"): 1.3}}, [(60, 30), (60, 30)]),
        ({"weight": {("c", "a"): 1.3, ("c", "b"): 0.7}}, [(60, 10), (60, 20), (60, 30)]),
        ({"groups": {"x": ["a"], "y": ["b", "c"]}}, [(60, 10), (60, 50)]),
        # A removed pair takes its rows out of a call: one call for each run of rows that are left.
        ({"bias": {("a", "b"): -math.inf}}, [(60, 10), (50, 20), (60, 30)]),
        ({"bias": {("b", "a"): -math.inf}}, [(10, 10), (30, 10), (60, 50)]),
    ],
)
def test_no_more_vendor_calls_than_needed(
    options: dict, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls_made = []
    attention_with_lse = sdpa.attention_with_lse

    def recording(q, k, v, scale, mask=None):
        calls_made.append((q.shape[2], k.shape[2]))
        return attention_with_lse(q, k, v, scale, mask)

    monkeypatch.setattr(sdpa, "attention_with_lse", recording)
    q, k, v = (torch.randn(2, 60, 2, 8) for _ in range(3))
    control = fb.Control(fb.Segments(a=10, b=20, c=30), **options)
    out = fb.attention(q, k, v, control, backend="composed")
    assert sorted(calls_made) == sorted(expected)
    torch.testing.assert_close(out, fb.attention(q, k, v, control, backend="reference"))

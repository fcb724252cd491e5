"""The C++ gradient against autograd of the float64 reference, on every instruction set that runs here."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from support.calls import Call, examples, random_calls
from support.gradients import check_gradients, gradients

small = random_calls(contrast=False, weights=(0.0, 0.25, 0.7, 1.0, 1.3, 4.0))


@settings(max_examples=examples(300))
@given(small)
def test_drawn_calls(call: Call) -> None:
    check_gradients(call, "cpu")


@settings(max_examples=examples(60))
@given(call=small)
def test_instruction_sets(isa: str, call: Call) -> None:
    check_gradients(call, "cpu")


def test_same_bits_for_any_number_of_threads(isa: str) -> None:
    q, k, v = (torch.randn(1, 200, 3, 64, dtype=torch.bfloat16) for _ in range(3))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(Call(q, k, v, None), "cpu", torch.ones_like(q)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

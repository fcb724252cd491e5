"""The C++ backend against float64 of the reference, on every instruction set that runs here."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import given, settings

import flashbrush as fb
from support.calls import Call, examples, random_calls
from support.error_bars import check_result


def run(call: Call) -> None:
    out = torch.full_like(call.run("reference"), float("nan"))
    _, stats = call.run("cpu", return_stats=True, out=out)
    check_result(call, out, stats)
    check_result(call, call.run("cpu"))  # without statistics neighbouring segments are joined


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_drawn_calls(dtype: torch.dtype) -> None:
    # FLASHBRUSH_TEST_PERCENT=200 draws the 2,000 that the error bar asks for. Each dtype draws calls of its
    # own: hypothesis would give all parameters of one test the same.
    seed = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}[dtype]

    @hypothesis.seed(seed)
    @settings(max_examples=examples(1000), derandomize=False, database=None)
    @given(random_calls(dtypes=(dtype,)))
    def drawn(call: Call) -> None:
        run(call)

    drawn()


@settings(max_examples=examples(100))
@given(call=random_calls())
def test_instruction_sets(isa: str, call: Call) -> None:
    run(call)


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 5, 5), (2, 6, 2), (1, 3, 1)])
def test_same_bits_for_any_number_of_threads(isa: str, batch: int, heads: int, kv_heads: int) -> None:
    """Up to four have a list of heads each, if there are as many; more share one."""
    rows, keys = (
        fb.Segments(prompt=20, subject=110, target=170),
        fb.Segments(prompt=20, subject=200, target=150),
    )
    control = fb.Control(
        rows,
        keys,
        weight={("target", "subject"): 1.3},
        bias={("prompt", "target"): -float("inf")},
        head_gain=fb.HeadGain(rows="target", keys="prompt", apply_to="target"),
        valid={"subject": torch.full((batch,), 170)},
    )
    q, k, v = (torch.randn(batch, n, h, 40) for n, h in ((300, heads), (370, kv_heads), (370, kv_heads)))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 5, 7, 2, 4):
            torch.set_num_threads(threads)
            out, stats = fb.attention(q, k, v, control, backend="cpu", return_stats=True)
            results.append((out, *stats))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

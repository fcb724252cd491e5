"""The C++ backend's path for a few rows, which reads keys where they lie, on every instruction set that runs
here.
"""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import given, settings

import flashbrush as fb
from support.calls import Call, examples, random_calls
from support.error_bars import check_result

# Up to 36 rows may share a key head there, rarely more are drawn; 700 keys a segment give several chunks.
few = random_calls(row_sizes=(0, 1, 2, 3, 5), longest=700)


def run(call: Call) -> None:
    out = torch.full_like(call.run("reference"), float("nan"))
    _, stats = call.run("cpu", return_stats=True, out=out)
    check_result(call, out, stats)
    check_result(call, call.run("cpu"))


def test_drawn_calls(isa: str) -> None:
    # Each instruction set draws calls of its own.
    @hypothesis.seed(sum(isa.encode()))
    @settings(max_examples=examples(400), derandomize=False, database=None)
    @given(few)
    def drawn(call: Call) -> None:
        run(call)

    drawn()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "rows", (1, 5, 6, 8, 36, 37)
)  # one to six share a read, then groups of six; the most, and one more
def test_numbers_of_rows(rows: int, dtype: torch.dtype) -> None:
    for dim in (64, 104, 256):
        q, k, v = (torch.randn(2, n, 2, dim).to(dtype) for n in (rows, 1700, 1700))
        run(Call(q, k, v, None))


@pytest.mark.parametrize("clip", (None, (0.0, 1.0)))
def test_same_bits_for_any_number_of_threads(isa: str, clip: tuple[float, float] | None) -> None:
    q, k, v = (torch.randn(1, n, heads, 64) for n, heads in ((4, 4), (3000, 2), (3000, 2)))
    rows, keys = fb.Segments(a=1, b=3), fb.Segments(x=1000, y=40, z=1960)
    control = fb.Control(rows, keys, weight={("a", "x"): 1.3}, contrast=fb.Contrast(1.67, clip))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, stats = fb.attention(q, k, v, control, backend="cpu", return_stats=True)
            results.append((out, stats.lse, stats.mass))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_what_is_not_allowed_is_not_read(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, n, 2, 40).to(dtype) for n in (5, 1500, 1500))
    rows, keys = fb.Segments(a=2, b=3), fb.Segments(x=10, y=5, z=1000, w=400, end=85)
    control = fb.Control(
        rows,
        keys,
        bias={("a", "y"): -math.inf, ("*", "z"): -math.inf},
        weight={("b", "w"): 0.0},
        valid={"end": torch.tensor([3])},
    )
    clean, before = fb.attention(q, k, v, control, backend="cpu", return_stats=True)
    for t in (k, v):
        t[:, 15:1015] = math.nan
        t[:, 1418:] = math.nan
    v[:, 1015:1415, 1] = math.nan  # of one head: rows of a weigh w with 1
    poisoned, after = fb.attention(q, k, v, control, backend="cpu", return_stats=True)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert torch.equal(clean[:, :, 0], poisoned[:, :, 0]) and torch.equal(clean[:, 2:], poisoned[:, 2:])
    assert bool(torch.isnan(poisoned[:, :2, 1]).all())
    k[:, 10:15] = math.nan  # rows of a do not see y, rows of b do
    half = fb.attention(q, k, v, control, backend="cpu")
    assert torch.equal(half[:, :2, 0], clean[:, :2, 0]) and bool(torch.isnan(half[:, 2:]).all())


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf), ids=str)
@pytest.mark.parametrize("tensor", ("q", "k", "v"))
def test_not_finite_where_the_reference_is_not(tensor: str, value: float) -> None:
    given = {
        "q": torch.randn(1, 3, 2, 32).abs(),
        "k": torch.randn(1, 1500, 2, 32),
        "v": torch.randn(1, 1500, 2, 32),
    }
    given[tensor][0, 2, 1, 3] = value
    out = fb.attention(**given, backend="cpu")
    truth = fb.attention(**given, backend="reference")
    assert torch.equal(torch.isnan(out), torch.isnan(truth)) and torch.equal(
        torch.isinf(out), torch.isinf(truth)
    )
    finite = torch.isfinite(truth)
    torch.testing.assert_close(out[finite], truth[finite], rtol=0, atol=1e-6)
    assert bool((~finite).any()) or (tensor, value) == ("k", -math.inf)

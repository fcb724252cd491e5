"""merge() of attentions over parts of the keys equals one attention over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

import flashbrush as fb


def attention_in_parts(sizes, dtype=torch.float64, rows=7):
    q = torch.randn(2, rows, 3, 8, dtype=dtype)
    keys = [torch.randn(2, n, 3, 8, dtype=dtype) for n in sizes]
    values = [torch.randn(2, n, 3, 8, dtype=dtype) for n in sizes]
    pairs = []
    for k, v in zip(keys, values, strict=True):
        out, stats = fb.attention(q, k, v, backend="reference", return_stats=True)
        pairs.append((out, stats.lse))
    return q, keys, values, pairs


@pytest.mark.parametrize("squeezed", (False, True))
@pytest.mark.parametrize("sizes", ((5,), (5, 1), (3, 0, 9), (0, 0), (40, 2, 17, 1)))
def test_equals_one_attention(sizes, squeezed: bool) -> None:
    q, keys, values, pairs = attention_in_parts(sizes)
    truth, stats = fb.attention(
        q, torch.cat(keys, 1), torch.cat(values, 1), backend="reference", return_stats=True
    )
    if squeezed:
        pairs = [(out, lse[..., 0]) for out, lse in pairs]
    out, lse = fb.merge(pairs)
    assert lse.shape == pairs[0][1].shape
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(lse.reshape(stats.lse.shape), stats.lse)


def test_part_without_keys_is_not_read() -> None:
    *_, pairs = attention_in_parts((5, 4))
    clean = fb.merge(pairs)
    nothing = (torch.full_like(pairs[0][0], math.nan), torch.full_like(pairs[0][1], -math.inf))
    for order in ([nothing, *pairs], [*pairs, nothing]):
        for a, b in zip(fb.merge(order), clean, strict=True):
            torch.testing.assert_close(a, b)
    out, lse = fb.merge([nothing, nothing])
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())


def test_large_and_small_lse() -> None:
    a, b = torch.randn(2, 1, 4, 2, 3).unbind()
    for shift in (-3e4, 3e4):
        out, lse = fb.merge(
            [(a, torch.full((1, 2, 4), shift)), (b, torch.full((1, 2, 4), shift + math.log(3)))]
        )
        torch.testing.assert_close(
            out, (a + 3 * b) / 4, rtol=1e-3, atol=1e-3
        )  # 3e4 + log 3 is rounded in float32
        torch.testing.assert_close(lse, torch.full((1, 2, 4), shift + math.log(4)))


def test_nan_propagates() -> None:
    *_, pairs = attention_in_parts((5, 4))
    pairs[1][0][0, 3, 1, 2] = math.nan
    out, _ = fb.merge(pairs)
    assert int(torch.isnan(out).sum()) == 1 and bool(torch.isnan(out[0, 3, 1, 2]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_dtypes(dtype: torch.dtype) -> None:
    q, keys, values, pairs = attention_in_parts((33, 20), dtype)
    out, lse = fb.merge(pairs)
    assert out.dtype == dtype and lse.dtype == torch.float32
    truth = fb.attention(
        *(t.double() for t in (q, torch.cat(keys, 1), torch.cat(values, 1))), backend="reference"
    )
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_gradcheck() -> None:
    outs = [torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    gone = torch.full((1, 2, 3), -math.inf, dtype=torch.float64)

    def call(a, b, c, x, y):
        out, lse = fb.merge([(a, x), (c, gone), (b, y)])
        return out, lse

    assert gradcheck(call, (*outs, *lses))


def test_bad_calls() -> None:
    *_, ((out, lse), (other, other_lse)) = attention_in_parts((5, 4))
    for bad, error, word in (
        ([], TypeError, "parts"),
        (5, TypeError, "parts"),
        ([out], TypeError, r"parts\[0\]"),
        ([(out, None)], TypeError, r"parts\[0\]"),
        ([(out[0], lse)], ValueError, r"parts\[0\].*batch, rows"),
        ([(out, lse.transpose(1, 2))], ValueError, r"parts\[0\].*lse"),
        ([(out, lse.expand(-1, -1, -1, 2))], ValueError, r"parts\[0\].*lse"),
        ([(out, lse.long())], ValueError, r"parts\[0\].*int64"),
        ([(out, lse), (other[:, :3], other_lse[:, :, :3])], ValueError, r"parts\[1\].*out"),
        ([(out, lse), (other, other_lse[..., 0])], ValueError, r"parts\[1\].*lse"),
        ([(out, lse), (other.float(), other_lse)], TypeError, r"parts\[1\].*float64.*float32"),
    ):
        with pytest.raises(error, match=word):
            fb.merge(bad)

"""attention_sum() equals its branches computed one by one and added."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

import flashbrush as fb

SHAPES = ((2, 7, 4, 8), (2, 9, 2, 8))


def tensors(dtype=torch.float32, **more) -> list[Tensor]:
    q, k = SHAPES
    return [torch.randn(s, dtype=dtype, **more) for s in (q, k, k)]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    swapped = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*swapped, scale=scale, enable_gqa=True).transpose(1, 2)


def test_equals_the_branches_added() -> None:
    a, b, c = tensors(), tensors(), tensors()
    gate, index = torch.rand(2, 7), torch.tensor([1, 0])
    branches = [
        fb.Branch(*a),
        fb.Branch(*b, gate=gate, scale=0.2),
        fb.Branch(*c, gate=-0.5, source={"q": index, "k": index}),
    ]
    expected = sdpa(*a) + gate[..., None, None] * sdpa(*b, 0.2) - 0.5 * sdpa(c[0][index], c[1][index], c[2])
    torch.testing.assert_close(fb.attention_sum(branches), expected)
    out = torch.full_like(expected, math.nan)
    assert fb.attention_sum(branches, out=out) is out
    torch.testing.assert_close(out, expected)


def test_branches_with_the_same_queries_equal_softmax_groups() -> None:
    q, k, v = tensors()
    keys = fb.Segments(text=4, image=5)
    gate = torch.rand(2, 7)
    groups = fb.Control(fb.Segments(r=7), keys, groups={"t": ["text"], "i": ["image"]}, gates={"i": gate})
    cut = keys.slice("text"), keys.slice("image")
    branches = [fb.Branch(q, k[:, s], v[:, s], gate=g) for s, g in zip(cut, (1.0, gate), strict=True)]
    torch.testing.assert_close(fb.attention_sum(branches), fb.attention(q, k, v, groups, backend="reference"))


def test_branch_with_its_own_control() -> None:
    q, k, v = tensors()
    control = fb.Control(fb.Segments(r=7), fb.Segments(x=4, y=5), weight={("*", "x"): 2.0}, gain={"r": 0.5})
    expected = fb.attention(q, k, v, control, backend="reference") + sdpa(q, v, k)
    torch.testing.assert_close(fb.attention_sum([fb.Branch(q, k, v, control), fb.Branch(q, v, k)]), expected)


def test_16_bits_round_each_branch_once_and_the_sum_once() -> None:
    branches = [fb.Branch(*tensors(torch.bfloat16)) for _ in range(3)]
    exact = sum(sdpa(*(t.double() for t in (b.q, b.k, b.v))) for b in branches)
    out = fb.attention_sum(branches)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=3 * 2**-8 * float(exact.abs().max()))


def test_gradcheck() -> None:
    a = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((1, 3, 2, 2), (1, 4, 2, 2), (1, 4, 2, 2))
    ]
    q = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(1, 3, dtype=torch.float64)
    assert gradcheck(
        lambda q2, q, k, v: fb.attention_sum([fb.Branch(q, k, v), fb.Branch(q2, k, v, gate=gate)]), [q, *a]
    )


def test_bad_calls_name_the_branch_and_write_nothing() -> None:
    q, k, v = tensors()
    good, out = fb.Branch(q, k, v), torch.full_like(q, math.nan)
    for bad, error, word in (
        ([], TypeError, "branches"),
        (good, TypeError, "branches"),
        ([good, (q, k, v)], TypeError, r"branches\[1\].*tuple"),
        ([good, fb.Branch(q, k, v[:, 1:])], ValueError, r"branches\[1\].*v"),
        ([good, fb.Branch(q[:, 1:], k, v)], ValueError, r"branches\[1\].*output"),
        ([good, fb.Branch(*(t.double() for t in (q, k, v)))], ValueError, r"branches\[1\].*float64"),
        ([good, fb.Branch(q, k, v, gate=math.nan)], ValueError, r"branches\[1\].gate.*finite"),
        ([good, fb.Branch(q, k, v, gate="a")], TypeError, r"branches\[1\].gate"),
        ([good, fb.Branch(q, k, v, gate=torch.rand(7))], ValueError, r"branches\[1\].gate.*\(2, 7\)"),
        ([good, fb.Branch(q, k, v, gate=torch.full((2, 7), math.inf))], ValueError, r"branches\[1\].gate"),
        (
            [good, fb.Branch(q, k, v, gate=torch.ones(2, 7, dtype=torch.int64))],
            TypeError,
            r"branches\[1\].gate",
        ),
        (
            [good, fb.Branch(q, k, v, gate=torch.rand(2, 7, requires_grad=True))],
            TypeError,
            r"branches\[1\].gate",
        ),
    ):
        with pytest.raises(error, match=word):
            fb.attention_sum(bad, out=out)
    with pytest.raises(ValueError, match="out"):
        fb.attention_sum([good], out=out[:, 1:])
    with pytest.raises(ValueError, match="out"):
        fb.attention_sum([fb.Branch(q.clone().requires_grad_(), k, v)], out=out)
    assert bool(torch.isnan(out).all())

"""query_blur() equals a padded float64 convolution; its gradient, and the limits of sigma."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck, gradgradcheck

import flashbrush as fb
from support.blur_oracle import blur_by_convolution, gaussian_taps
from support.calls import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
sides = st.integers(1, 12)
sigmas = st.sampled_from((0.05, 1 / 6, 0.2, 0.5, 0.9, 2.0, 7.3, 1e3, 1e308))


def queries(
    batch: int, tokens: int, dtype: torch.dtype = torch.float64, heads: int = 2, dim: int = 3
) -> torch.Tensor:
    return torch.randn(batch, tokens, heads, dim, dtype=torch.float64).to(dtype)


@settings(max_examples=examples(200))
@given(sides, sides, sigmas, st.integers(0, 2), st.sampled_from(DTYPES), st.integers(0, 3), st.integers(0, 3))
def test_equals_convolution(
    h: int, w: int, sigma: float, batch: int, dtype: torch.dtype, before: int, after: int
) -> None:
    q = queries(batch, before + h * w + after, dtype)
    image = slice(before, before + h * w)
    got = fb.query_blur(q, (h, w), sigma, tokens=image)
    exact = blur_by_convolution(q[:, image], (h, w), min(sigma, 1e9))
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bar = torch.finfo(dtype).eps * 0.5001 * exact.abs() + 32 * eps
    assert got.dtype == dtype and got.shape == q.shape and got.is_contiguous()
    assert ((got[:, image].double() - exact).abs() <= bar).all()
    assert torch.equal(got[:, :before], q[:, :before]) and torch.equal(
        got[:, image.stop :], q[:, image.stop :]
    )


def test_the_number_of_taps() -> None:
    """An impulse spreads over as many positions as there are taps: an odd number, at most the side."""
    for side, sigma, expected in (
        (31, 0.1, 1),
        (31, 1 / 6, 1),
        (31, 0.3, 3),
        (31, 1.0, 7),
        (31, 1.1, 7),
        (31, 1.2, 9),
        (31, 50.0, 31),
        (32, 50.0, 31),
        (2, 50.0, 1),
        (1, 50.0, 1),
    ):
        q = torch.zeros(1, side, 1, 1, dtype=torch.float64)
        q[:, side // 2] = 1
        got = fb.query_blur(q, (1, side), sigma)
        assert len(gaussian_taps(side, sigma)) == expected
        # Taps beyond the border are reflected onto the image, so none is lost.
        assert int((got != 0).sum()) == min(expected, side)


@pytest.mark.parametrize("sigma", (0.7, 3.0))
def test_output_is_a_weighted_mean_of_the_input(sigma: float) -> None:
    """The weights add up to one, and no output lies outside the range of the input."""
    constant = torch.full((1, 30, 2, 4), 2.5)
    torch.testing.assert_close(fb.query_blur(constant, (5, 6), sigma), constant)
    q = queries(1, 30)
    got = fb.query_blur(q, (5, 6), sigma)
    assert (got <= q.amax(1, keepdim=True)).all() and (got >= q.amin(1, keepdim=True)).all()
    assert got.var() < q.var()


@pytest.mark.parametrize("sigma", (0.7, 3.0, math.inf))
def test_transposing_the_image_transposes_the_result(sigma: float) -> None:
    q = queries(2, 35)
    turned = q.unflatten(1, (5, 7)).transpose(1, 2).flatten(1, 2)
    expected = fb.query_blur(q, (5, 7), sigma).unflatten(1, (5, 7)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(fb.query_blur(turned, (7, 5), sigma), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_sigma_is_the_mean(dtype: torch.dtype) -> None:
    q = queries(2, 12, dtype)
    mean = q.double().mean(1, keepdim=True)
    whole = fb.query_blur(q, (3, 4), math.inf)
    assert whole.shape == q.shape and whole.stride(1) == 0
    error = torch.finfo(dtype).eps
    torch.testing.assert_close(whole[:, :1].double(), mean, rtol=error, atol=error)
    part = fb.query_blur(q, (2, 4), math.inf, tokens=slice(-9, -1))
    image = part[:, 3:11]
    torch.testing.assert_close(
        image.double(), q[:, 3:11].double().mean(1, keepdim=True).expand_as(image), rtol=error, atol=error
    )
    assert torch.equal(part[:, :3], q[:, :3]) and torch.equal(part[:, 11:], q[:, 11:])


def test_infinite_sigma_needs_one_row_of_attention() -> None:
    q, k, v = (queries(1, 12, torch.float32) for _ in range(3))
    rows = fb.query_blur(q, (3, 4), math.inf)
    one = fb.attention(rows[:, :1].contiguous(), k, v)
    torch.testing.assert_close(one.expand_as(q), fb.attention(rows.contiguous(), k, v))


def test_sigma_zero_returns_q() -> None:
    q = queries(1, 12)
    assert fb.query_blur(q, (3, 4), 0) is q and fb.query_blur(q, (3, 2), 0.0, tokens=slice(6)) is q


@pytest.mark.parametrize("tokens", (slice(2, 14), slice(2, -1), slice(-13, -1), slice(2, 14, 1)), ids=str)
def test_tokens_as_slices(tokens: slice) -> None:
    q = queries(1, 15)
    expected = fb.query_blur(q, (3, 4), 1.0, tokens=slice(2, 14))
    assert torch.equal(fb.query_blur(q, (3, 4), 1.0, tokens=tokens), expected)
    assert torch.equal(expected[:, 2:14], fb.query_blur(q[:, 2:14], (3, 4), 1.0))


def test_any_strides() -> None:
    q = queries(2, 12, heads=3, dim=4)
    expected = fb.query_blur(q, (3, 4), 1.0)
    for strided in (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        q.repeat_interleave(2, 3)[..., ::2],
        q.repeat(2, 1, 1, 1)[1:3],
    ):
        given = strided if torch.equal(strided, q) else strided.flip(0)
        torch.testing.assert_close(fb.query_blur(given, (3, 4), 1.0), expected)


@pytest.mark.parametrize("sigma", (0.6, 5.0, math.inf))
def test_gradcheck(sigma: float) -> None:
    q = queries(2, 15, heads=1).requires_grad_()
    call = lambda q: fb.query_blur(q, (3, 4), sigma, tokens=slice(1, 13))  # noqa: E731
    assert gradcheck(call, (q,)) and gradgradcheck(call, (q,))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    q = queries(2, 15, dtype)
    for transposed in (False, True):
        torch.library.opcheck(torch.ops.flashbrush.query_blur.default, (q, 3, 4, 0.7, 2, transposed))


@pytest.mark.parametrize("sigma", (0.0, 0.7, math.inf))
def test_compiles_without_a_graph_break(sigma: float) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q: fb.query_blur(q, (3, q.shape[1] // 3 - 1), sigma, tokens=slice(3, None)) * 2,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for tokens in (15, 18):
        q = queries(2, tokens).requires_grad_()
        same = q.detach().clone().requires_grad_()
        got = compiled(q)
        expected = 2 * fb.query_blur(same, (3, tokens // 3 - 1), sigma, tokens=slice(3, None))
        got.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(q.grad, same.grad)


Q = torch.randn(1, 12, 2, 4)
BAD = [
    ("q", TypeError, {"q": "queries"}),
    ("q", TypeError, {"q": Q.long()}),
    ("q", ValueError, {"q": Q[0]}),
    ("grid", TypeError, {"grid": 12}),
    ("grid", TypeError, {"grid": (3, 4, 1)}),
    ("grid", TypeError, {"grid": (3.0, 4)}),
    ("grid", TypeError, {"grid": (True, 12)}),
    ("grid", ValueError, {"grid": (0, 4)}),
    ("grid", ValueError, {"grid": (-3, -4)}),
    ("grid", ValueError, {"grid": (3, 5)}),
    ("sigma", TypeError, {"sigma": "inf"}),
    ("sigma", TypeError, {"sigma": True}),
    ("sigma", TypeError, {"sigma": torch.tensor(1.0)}),
    ("sigma", ValueError, {"sigma": -1}),
    ("sigma", ValueError, {"sigma": math.nan}),
    ("tokens", TypeError, {"tokens": (0, 12)}),
    ("tokens", ValueError, {"tokens": slice(0, 12, 2)}),
    ("tokens", ValueError, {"tokens": slice(0.0, 12)}),
    ("tokens", ValueError, {"tokens": slice(1, 12)}),
    ("tokens", ValueError, {"tokens": slice(8, 2)}),
]


@pytest.mark.parametrize(
    ("argument", "error", "changed"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)]
)
def test_bad_calls_name_the_argument(argument: str, error: type[Exception], changed: dict) -> None:
    call = {"q": Q, "grid": (3, 4), "sigma": 1.0, **changed}
    with pytest.raises(error, match=rf"^{argument}: expected .*got "):
        fb.query_blur(call.pop("q"), call.pop("grid"), call.pop("sigma"), **call)

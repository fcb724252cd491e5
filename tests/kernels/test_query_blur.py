"""query_blur in Triton against a float64 convolution: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import flashbrush as fb
from flashbrush.bindings.backends import planner, triton as backend
from flashbrush.bindings.backends.gpu.eligibility import emulated
from flashbrush.bindings.backends.interface import Operator
from flashbrush.kernels.query_blur import BLOCK_J, blur_side
from support.blur_oracle import blur_by_convolution
from support.calls import examples

pytestmark = pytest.mark.skipif(bool(backend.available()), reason="; ".join(backend.available()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU take the Triton kernels too, in the interpreter."""
    monkeypatch.setitem(planner.FUSED, "cpu", backend)


def check(got: Tensor, q: Tensor, grid: tuple[int, int], sigma: float) -> None:
    exact = blur_by_convolution(q, grid, sigma)
    assert got.isfinite().all()
    bar = torch.finfo(q.dtype).eps * 0.5001 * exact.abs() + 8 * torch.finfo(torch.float32).eps * float(
        q.abs().max()
    )
    assert ((got.double() - exact).abs() <= bar).all()


@st.composite
def queries(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int], float, int]:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    grid = draw(st.sampled_from(((1, 1), (1, 9), (5, 4), (8, 8), (3, 40))))
    heads, dim = draw(st.sampled_from(((1, 1), (2, 5), (2, 40))))
    text = draw(st.sampled_from((0, 3)))
    tokens = grid[0] * grid[1] + 2 * text
    batch = draw(st.sampled_from((1, 2)))
    q = torch.randn(batch, tokens, heads, dim)
    order = draw(st.sampled_from(("rows", "heads", "columns")))
    if order == "heads":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif order == "columns":
        q = torch.randn(batch, tokens, heads, 2 * dim)[..., ::2]
    return q.to(draw(st.sampled_from(DTYPES))), grid, draw(st.sampled_from((0.1, 0.5, 1.7, 20.0))), text


@settings(max_examples=400 if DEVICE == "cuda" else examples(15))
@given(queries())
def test_drawn_queries(call: tuple[Tensor, tuple[int, int], float, int]) -> None:
    q, grid, sigma, text = call
    q = q.to(DEVICE)
    image = slice(text, text + grid[0] * grid[1])
    got = fb.query_blur(q, grid, sigma, tokens=image)
    check(got[:, image], q[:, image], grid, sigma)
    assert torch.equal(got[:, :text], q[:, :text]) and torch.equal(got[:, image.stop :], q[:, image.stop :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written(dtype: torch.dtype) -> None:
    """Into outputs that hold NaN, over several blocks of places and columns; what the matrix leaves out is
    not read.
    """
    side, radius = 3 * BLOCK_J + 5, 3
    x = torch.randn(1, 1, side, 1, 70).to(dtype).to(DEVICE)
    y = torch.full_like(x, math.nan)
    near = (torch.arange(side)[:, None] - torch.arange(side)).abs() <= radius
    matrix = torch.where(near, torch.rand(side, side), 0.0).to(DEVICE)
    blur_side(y, x, matrix, radius, "ieee", emulated(x))
    exact = torch.einsum("ij,bljhd->blihd", matrix.double(), x.double())
    bar = torch.finfo(dtype).eps * 0.5001 * exact.abs() + 1e-5
    assert y.isfinite().all() and ((y.double() - exact).abs() <= bar).all()


def test_gradient_is_the_transpose() -> None:
    q = torch.randn(1, 35, 2, 3, device=DEVICE, requires_grad=True)
    exact = q.detach().double().requires_grad_()
    dout = torch.randn(1, 35, 2, 3, device=DEVICE)
    (got,) = torch.autograd.grad(fb.query_blur(q, (5, 7), 0.8), q, dout)
    (expected,) = torch.autograd.grad(blur_by_convolution(exact, (5, 7), 0.8), exact, dout.double())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)


def test_it_is_launched_and_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    run, why_not = backend.OPERATORS["query_blur"]
    spy = Operator(lambda *args: (launched.append(args), run(*args))[1], why_not)
    monkeypatch.setitem(backend.OPERATORS, "query_blur", spy)
    torch._dynamo.reset()
    compiled = torch.compile(fb.query_blur, fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 14, 2, 4, device=DEVICE)
    got = compiled(q, (3, 4), 1.0, tokens=slice(2, None))
    assert len(launched) == 1
    check(got[:, 2:], q[:, 2:], (3, 4), 1.0)
    torch.library.opcheck(torch.ops.flashbrush.query_blur.default, (q, 3, 4, 1.0, 2, False))
    assert fb.query_blur(q[:0], (2, 7), 1.0).shape == (0, 14, 2, 4)

"""qk_norm_rope() equals loops over complex numbers, and diffusers' own functions where they are installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import flashbrush as fb
from flashbrush.bindings.backends.composed import qk_norm_rope as composed
from flashbrush.bindings.core.norm_rope import NormRope
from support.rounding import ROUNDING
from support.token_streams import EPS, streams, tables


def norm_rope_by_loops(parts, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    tokens = []
    for x, weight, offset in parts:
        for t in range(x.shape[1]):
            y = x[:, t].double()
            if weight is not None:
                y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
            tokens.append(y if offset is None else y + offset[t].double())
    out = torch.stack(tokens, 1)
    dim, half = out.shape[3], out.shape[3] // 2
    for t in range(out.shape[1]):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if rope == "interleaved" else (i, i + half)
            z = torch.complex(out[:, t, :, a].clone(), out[:, t, :, b].clone())
            z = z * complex(float(cos[t, a]), float(sin[t, a]))
            out[:, t, :, a], out[:, t, :, b] = z.real, z.imag
    assert dim == 2 * half
    return out


@pytest.mark.parametrize("rope", ("interleaved", "half"))
@pytest.mark.parametrize("sizes", ((5,), (4, 7), (3, 0, 6), (1, 2, 3, 4)))
def test_equals_loops(sizes: tuple[int, ...], rope: str) -> None:
    parts = streams(*sizes)
    cos, sin = tables(sum(sizes), 8, rope, torch.float64)
    got = fb.qk_norm_rope(parts, cos, sin, eps=EPS, rope=rope)
    torch.testing.assert_close(got, norm_rope_by_loops(parts, cos, sin, rope))


def test_without_rotation_and_with_permutation() -> None:
    parts = streams(4, 7)
    cos, sin = tables(11, 8, "half", torch.float64)
    plain = fb.qk_norm_rope(parts, None, None, eps=EPS)
    torch.testing.assert_close(
        plain, norm_rope_by_loops(parts, torch.ones(11, 8), torch.zeros(11, 8), "half")
    )
    rotated = fb.qk_norm_rope(parts, cos, sin, eps=EPS, rope="half")
    labels = torch.randint(0, 3, (2, 11))
    for given in (labels[0], labels):
        permutation = fb.Segments.from_labels(given, ["a", "b", "c"])[1]
        got = fb.qk_norm_rope(parts, cos, sin, eps=EPS, rope="half", permutation=permutation)
        for b in range(2):
            order = permutation if permutation.dim() == 1 else permutation[b]
            assert torch.equal(got[b], rotated[b, order])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("rope", ("interleaved", "half"))
def test_error_is_at_most_that_of_stock_processors(rope: str, dtype: torch.dtype) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    text, image = (torch.randn(2, n, 3, 32).to(dtype) for n in (5, 9))
    norms = [torch.nn.RMSNorm(32, eps=EPS).to(dtype).requires_grad_(False) for _ in range(2)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    interleaved = rope == "interleaved"
    cos, sin = embeddings.get_1d_rotary_pos_embed(
        32, torch.arange(14), use_real=True, repeat_interleave_real=interleaved
    )
    joined = torch.cat([n(x) for n, x in zip(norms, (text, image), strict=True)], 1)
    kind = -1 if interleaved else -2
    stock = embeddings.apply_rotary_emb(joined, (cos, sin), use_real_unbind_dim=kind, sequence_dim=1)
    xs, weights = [text, image], [n.weight for n in norms]
    call = NormRope(xs, weights, [None, None], cos, sin, EPS, not interleaved, None)
    assert torch.equal(composed.forward(call), stock)
    got = fb.qk_norm_rope(
        [(x, w, None) for x, w in zip(xs, weights, strict=True)], cos, sin, eps=EPS, rope=rope
    )
    truth = norm_rope_by_loops(
        [(x.double(), w.double(), None) for x, w in zip(xs, weights, strict=True)], cos, sin, rope
    )
    ulp = torch.finfo(dtype).eps * truth.abs().max()
    assert (got - truth).abs().max() <= (stock - truth).abs().max() + ulp / 2
    if dtype == torch.float32:
        # Squares of the errors: 1.5 of the sum of 32 squares, 2.5 of 1 / sqrt(mean + eps), 2 of the products
        # with x and the weight, 2 of the rotation, none relative to more than the length of a rotated pair.
        pairs = truth.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        length = pairs.square().sum(-1 if interleaved else -2).sqrt().mean()
        allowed = (
            0.8 * ROUNDING * 8**0.5 * length
        )  # the mean of a normal error is 0.8 of its root mean square
    else:  # stock rounds to 16 bits between its steps
        allowed = (stock - truth).abs().mean()
    assert (got - truth).abs().mean() <= allowed


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kernel", (True, False), ids=("kernel", "torch"))
def test_gradients_of_inputs_weights_and_offsets(
    kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cos, sin = tables(9, 8, "half")
    permutation = torch.stack([torch.randperm(9) for _ in range(2)])
    (a, weight, _), (b, _, shift) = streams(4, 5, dtype=dtype)
    everyone = torch.randn(1, 3, 8)  # of all tokens, in float32 beside x in any dtype

    def call(run, a, b, weight, shift, everyone):
        parts = [(a, weight, everyone), (b, None, shift)]
        backend = "auto" if kernel else "composed"
        return run(parts, cos, sin, eps=EPS, rope="half", permutation=permutation, backend=backend)

    def through_torch(parts, cos, sin, eps, rope, permutation, backend):
        columns = (list(column) for column in zip(*parts, strict=True))
        return composed.forward(NormRope(*columns, cos.double(), sin.double(), eps, True, permutation))

    tensors = [t.requires_grad_() for t in (a, b, weight, shift, everyone)]
    out = call(fb.qk_norm_rope, *tensors)
    dout = torch.randn_like(out)
    compiled = torch.compile(fb.qk_norm_rope, fullgraph=True, backend="aot_eager")
    wide = [t.detach().double().requires_grad_() for t in tensors]
    truth = torch.autograd.grad(call(through_torch, *wide), wide, dout.double())
    grads = torch.autograd.grad(out, tensors, dout)
    again = torch.autograd.grad(call(compiled, *tensors), tensors, dout)
    assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))
    for t, got, exact in zip(tensors, grads, truth, strict=True):
        assert got.shape == t.shape and got.dtype == t.dtype
        assert (got - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    for i, t in enumerate(tensors):  # alone
        only = [u if u is t else u.detach() for u in tensors]
        assert torch.equal(torch.autograd.grad(call(fb.qk_norm_rope, *only), t, dout)[0], grads[i])


def test_strided_streams() -> None:
    fused = torch.randn(2, 6, 3, 3, 8)  # q, k and v of one projection
    x, weight = fused[:, :, 1], torch.rand(8)
    cos, sin = tables(6, 8, "interleaved")
    got = fb.qk_norm_rope([(x, weight, None)], cos, sin, eps=EPS)
    expected = fb.qk_norm_rope([(x.contiguous(), weight, None)], cos, sin, eps=EPS)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rope", ("interleaved", "half"))
def test_gradcheck(rope: str) -> None:
    a, b = (torch.randn(1, n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (2, 3))
    weight = (torch.rand(4, dtype=torch.float64) + 0.5).requires_grad_()
    offset = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(5, 4, rope, torch.float64)
    permutation = torch.tensor([3, 1, 4, 0, 2])

    def call(a, b, weight, offset):
        parts = [(a, weight, offset), (b, None, None)]
        return fb.qk_norm_rope(parts, cos, sin, eps=EPS, rope=rope, permutation=permutation)

    assert gradcheck(call, (a, b, weight, offset))


def test_bad_calls() -> None:
    x, w = torch.randn(2, 4, 3, 8), torch.rand(8)
    cos, sin = tables(4, 8, "half")
    good = [(x, w, None)]
    for parts, tabs, more, error, word in (
        ([], (cos, sin), {}, TypeError, "streams"),
        ([x], (cos, sin), {}, TypeError, r"streams\[0\]"),
        ([(x[0], w, None)], (cos, sin), {}, TypeError, r"streams\[0\].*\(4, 3, 8\)"),
        ([(x.long(), w, None)], (cos, sin), {}, TypeError, r"streams\[0\].*int64"),
        ([(x, w[:7], None)], (cos, sin), {}, ValueError, r"streams\[0\].*norm weight \(8,\).*\(7,\)"),
        ([(x, 1.0, None)], (cos, sin), {}, TypeError, r"streams\[0\].*norm weight.*float"),
        ([(x, w, torch.randn(5, 1, 8))], (cos, sin), {}, ValueError, r"streams\[0\].*offset"),
        ([*good, (x[:1], w, None)], (cos, sin), {}, ValueError, r"streams\[1\].*batch 2"),
        ([*good, (x.double(), w, None)], (cos, sin), {}, TypeError, r"streams\[1\].*float32.*float64"),
        (good, (cos[:3], sin), {}, ValueError, r"cos.*\(4 tokens, 8\).*\(3, 8\)"),
        (good, (cos, sin[:, :4]), {}, ValueError, "sin"),
        (good, (cos, None), {}, ValueError, "cos, sin"),
        (good, (cos.long(), sin), {}, TypeError, "cos.*int64"),
        (good, (cos, sin), {"eps": math.nan}, ValueError, "eps.*nan"),
        (good, (cos, sin), {"eps": -1.0}, ValueError, "eps.*-1"),
        (good, (cos, sin), {"rope": "whole"}, ValueError, "rope.*interleaved.*whole"),
        (good, (cos, sin), {"permutation": torch.arange(5)}, ValueError, r"permutation.*\(4,\)"),
        (good, (cos, sin), {"permutation": torch.rand(4)}, TypeError, "permutation.*float32"),
        (good, (cos, sin), {"permutation": torch.tensor([0, 1, 2, 4])}, ValueError, r"permutation.*0\.\.3"),
        ([(x[..., :7], w[:7], None)], (cos[:, :7], sin[:, :7]), {}, ValueError, "cos.*even"),
    ):
        with pytest.raises(error, match=word):
            fb.qk_norm_rope(parts, *tabs, **{"eps": EPS, **more})

"""Inputs at the ends of the number range: every backend of this machine does with them what SDPA does."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashbrush as fb
from flashbrush.bindings.backends.cpu import library as cpu
from support.calls import Call
from support.error_bars import check_result
from support.rounding import ROUNDING, cpu_attention, positive_sum

BACKENDS = ["reference", "composed", *(f"cpu-{isa}" for isa in cpu.isas())]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, KEYS, HEADS, DIM = 37, 150, 2, 32  # two tiles of keys, the second not full


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("FLASHBRUSH_CPU_ISA", isa)
    return name


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, n, HEADS, DIM).to(dtype) for n in (ROWS, KEYS, KEYS))
    return q, k, v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, by the definition that SDPA's fallback computes."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(backend: str, dtype: torch.dtype) -> None:
    q, k, v = draw(dtype)
    # Few bits in q and k: products and sums are then exact, and what is tested is the softmax.
    q, k = ((t * 2).round().clamp(-4, 4).to(dtype) for t in (q, k))
    largest = float((torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double())).abs().max())
    scale = 1e4 / largest
    call = Call(q, k, v, None, {"scale": scale})
    out, stats = call.run(backend, return_stats=True)
    check_result(call, out)
    truth = call.to(torch.float64).run("reference", return_stats=True)[1]
    assert float(truth.lse.abs().max()) > 5e3
    torch.testing.assert_close(stats.lse.double(), truth.lse, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("level", (0.0, -1e4, 1e4), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_keys_alike(backend: str, dtype: torch.dtype, level: float) -> None:
    q, k, v = draw(dtype)
    k = k[:, :1].expand(-1, KEYS, -1, -1).contiguous()
    control = fb.Control(fb.Segments(r=ROWS), fb.Segments(a=100, b=50), bias={("r", "*"): level})
    out, stats = fb.attention(q, k, v, control, backend=backend, return_stats=True)
    mean = v.double().mean(1, keepdim=True).expand(-1, ROWS, -1, -1)
    # composed merges segments by their float32 lse, of which 1e4 leaves three decimals
    slack = 1e-3 if backend == "composed" and level else 0.0
    torch.testing.assert_close(out.double(), mean, rtol=slack, atol=2 * torch.finfo(dtype).eps + slack)
    shares = stats.mass[:, :, 0] / ROWS
    torch.testing.assert_close(
        shares, torch.tensor([100 / 150, 50 / 150]).expand_as(shares), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("place", (0, 70, KEYS - 1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_huge_key(backend: str, dtype: torch.dtype, place: int) -> None:
    q, k, v = draw(dtype)
    q = q.abs()
    k[:, place] = 300.0
    out = fb.attention(q, k, v, backend=backend)
    torch.testing.assert_close(
        out, v[:, place : place + 1].expand_as(out), rtol=2 * torch.finfo(dtype).eps, atol=0
    )


def test_denormals(backend: str) -> None:
    q, k, v = draw(torch.float32)
    out = fb.attention(q * 1e-40, k * 1e-40, v, backend=backend)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=1e-4, atol=1e-6)
    tiny = (v * 1e-40).abs()
    out = fb.attention(q, k, tiny, backend=backend)
    assert bool(torch.isfinite(out).all())
    torch.testing.assert_close(out.double(), sdpa(q, k, tiny), rtol=0, atol=2e-43)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf), ids=str)
@pytest.mark.parametrize("tensor", ("q", "k", "v"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_not_finite_where_sdpa_is_not(backend: str, dtype: torch.dtype, tensor: str, value: float) -> None:
    given = dict(zip("qkv", draw(dtype), strict=True))
    given["q"] = given["q"].abs()  # an infinite key then has an infinite logit of one sign in every row
    given[tensor][0, 20, 1, 3] = value
    out = fb.attention(**given, backend=backend)
    truth = sdpa(**given)
    assert torch.equal(torch.isnan(out), torch.isnan(truth)), "NaN elsewhere than in SDPA"
    assert torch.equal(torch.isinf(out), torch.isinf(truth))
    finite = torch.isfinite(truth)
    torch.testing.assert_close(out.double()[finite], truth[finite], rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert bool((~finite).any()) or (tensor == "k" and value == -math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_removed_keys_are_not_read(backend: str, dtype: torch.dtype) -> None:
    q, k, v = draw(dtype)
    rows, keys = fb.Segments(a=20, b=17), fb.Segments(x=10, y=5, z=100, end=35)
    control = fb.Control(
        rows, keys, bias={("a", "y"): -math.inf, ("b", "z"): -math.inf}, valid={"end": torch.tensor([3])}
    )
    clean = fb.attention(q, k, v, control, backend=backend, return_stats=True)
    for t in (k, v):
        t[:, 118:] = math.nan
    poisoned = fb.attention(q, k, v, control, backend=backend, return_stats=True)
    for before, after in zip((clean[0], *clean[1]), (poisoned[0], *poisoned[1]), strict=True):
        assert torch.equal(before, after)
    for t in (k, v):
        t[:, 10:15] = math.nan  # rows of a do not see y, rows of b do
    out = fb.attention(q, k, v, control, backend=backend)
    assert torch.equal(out[:, :20], clean[0][:, :20]) and bool(torch.isnan(out[:, 20:]).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_removed_keys_are_not_in_a_gradient(backend: str, dtype: torch.dtype) -> None:
    given, upstream = draw(dtype), torch.randn(1, ROWS, HEADS, DIM).to(dtype)
    rows, keys = fb.Segments(a=20, b=17), fb.Segments(x=10, y=5, z=100, end=35)
    control = fb.Control(rows, keys, bias={("a", "y"): -math.inf}, valid={"end": torch.tensor([3])})

    def gradients() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in given]
        out = fb.attention(*leaves, control, backend=backend)
        return torch.autograd.grad(out, leaves, upstream)

    clean = gradients()
    for t in given[1:]:
        t[:, 118:] = math.nan
    poisoned = gradients()
    for before, after in zip(clean, poisoned, strict=True):
        assert torch.equal(before, after)
    for t in given[1:]:
        t[:, 10:15] = math.nan  # rows of a do not see y, rows of b do
    dq = gradients()[0]
    assert torch.equal(dq[:, :20], clean[0][:, :20]) and bool(torch.isnan(dq[:, 20:]).all())


@pytest.mark.parametrize("tensor", [False, True])
def test_values_of_weight_0_or_of_a_tensor_of_inf_are_not_read(backend: str, tensor: bool) -> None:
    q, k, v = (t.requires_grad_() for t in draw(torch.float32))
    rows, keys = fb.Segments(r=ROWS), fb.Segments(a=100, b=50)
    nothing = torch.full((HEADS,), -math.inf)
    control = (
        fb.Control(rows, keys, bias={("r", "b"): nothing})
        if tensor
        else fb.Control(rows, keys, weight={("r", "b"): 0.0})
    )
    with torch.no_grad():
        v[:, 100:] = math.nan
        if tensor:
            k[:, 100:] = math.nan
    out, stats = fb.attention(q, k, v, control, backend=backend, return_stats=True)
    assert (
        bool(out.isfinite().all()) and bool(stats.lse.isfinite().all()) and bool(stats.mass.isfinite().all())
    )
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("backend_name", ["composed", "reference"])
def test_rows_of_a_mask_of_minus_a_thousand_million(backend_name: str) -> None:
    """What fills padded rows: their keys are all alike, whatever their segments."""
    q, k, v = draw(torch.float32)
    mask = torch.zeros(ROWS, KEYS)
    mask[:5] = -1e9
    control = fb.Control(fb.Segments(r=ROWS), fb.Segments(a=100, b=30, c=20))
    out, stats = fb.attention(q, k, v, control, mask=mask, backend=backend_name, return_stats=True)
    torch.testing.assert_close(stats.mass.sum(-1), torch.full((1, HEADS, 1), float(ROWS)), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        out[:, 5:], fb.attention(q, k, v, backend="reference")[:, 5:], rtol=1e-4, atol=1e-5
    )
    if backend_name == "composed":  # the mask's share is taken out before float32 loses what is added to it
        torch.testing.assert_close(
            out[:, :5], fb.attention(q, k, v, backend="reference")[:, :5], rtol=1e-4, atol=1e-5
        )
        dout, got, plain = torch.randn_like(out), [], []
        for grads, call in (
            (got, {"control": control, "mask": mask, "backend": "composed"}),
            (plain, {"backend": "reference"}),
        ):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            grads.extend(torch.autograd.grad(fb.attention(*leaves, **call), leaves, dout))
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", (33, 64))  # on the cpu backend K and V as they lie, and packed
@pytest.mark.parametrize("keys", (1024, 5120))
def test_float32_stays_exact_over_long_rows(backend: str, keys: int, rows: int) -> None:
    """Values of one sign, so that the roundings of a sum over all keys show in the output."""
    q, k, v = torch.randn(1, rows, 1, 64), torch.randn(1, keys, 1, 64), torch.rand(1, keys, 1, 64)
    truth = sdpa(q, k, v)
    error = (fb.attention(q, k, v, backend=backend).double() / truth - 1).square().mean().sqrt()
    if backend == "cpu":
        variance = cpu_attention(keys)
    else:  # sums of a library: term by term at worst
        variance = 2 * positive_sum(keys) + 2
    assert float(error) <= 1.4 * ROUNDING * variance**0.5


@pytest.mark.parametrize("default", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_the_default_dtype_does_not_matter(backend: str, default: torch.dtype) -> None:
    q, k, v = draw(torch.float32)
    control = fb.Control(
        fb.Segments(r=ROWS),
        fb.Segments(a=100, b=50),
        weight={("r", "a"): 1.5},
        head_gain=fb.HeadGain("r", "a"),
    )

    def everything() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out, stats = fb.attention(*leaves, control, backend=backend, return_stats=True)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        x, norm = q.detach().requires_grad_(), torch.ones(DIM, dtype=torch.float32, requires_grad=True)
        normed = fb.qk_norm_rope([(x, norm, None)], None, None, eps=1e-6)
        seen = fb.column_mass(q, k, stats.lse, control), fb.key_probabilities(q, k, stats.lse, [3], control)
        return [out, *stats, *grads, *torch.autograd.grad(normed.square().sum(), (x, norm)), *seen]

    expected, before = everything(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

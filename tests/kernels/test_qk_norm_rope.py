"""The Triton kernels of qk_norm_rope against float64: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import flashbrush as fb
from flashbrush.bindings.backends import planner, triton
from flashbrush.bindings.backends.gpu.device import interpreted
from flashbrush.bindings.backends.triton import qk_norm_rope as triton_norm_rope
from flashbrush.bindings.core.norm_rope import NormRope
from flashbrush.kernels import qk_norm_rope as kernels
from support.calls import examples
from support.compiled import compile_elsewhere

pytestmark = pytest.mark.skipif(bool(triton.available()), reason="; ".join(triton.available()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
EPS32 = torch.finfo(torch.float32).eps


@dataclass
class Case:
    xs: list[Tensor]
    weights: list  # of tensors or None; also offsets
    offsets: list
    cos: Tensor | None
    sin: Tensor | None
    half: bool
    permutation: Tensor | None
    parts: int = 1024
    eps: float = EPS

    @property
    def tables(self) -> tuple:
        return self.cos, self.sin, self.eps, self.half, self.permutation

    @property
    def call(self) -> NormRope:
        return NormRope(self.xs, self.weights, self.offsets, *self.tables)

    def __repr__(self) -> str:
        def show(tensors):
            return [None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in tensors]

        tensors = map(show, (self.xs, self.weights, self.offsets, [self.cos, self.permutation]))
        return f"Case({', '.join(map(str, tensors))}, {self.half}, {self.parts})"


@st.composite
def cases(draw) -> Case:
    """Streams of any layout, with and without norm, offset, rotation and permutation."""
    chance = lambda p: draw(st.integers(0, 99)) < 100 * p  # noqa: E731
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    dtype, batch = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3))
    rope = draw(st.sampled_from((None, "interleaved", "half")))
    dim = draw(st.sampled_from((2, 6, 32, 40, 64, 128, 256) if rope else (1, 5, 33, 40, 128, 255)))
    heads = draw(st.sampled_from((1, 2, 3, 5) if dim > 64 else (1, 3, 8, 12)))
    lengths = draw(
        st.lists(st.sampled_from((0, 1, 2, 4) if dim > 64 else (0, 1, 5, 11)), min_size=1, max_size=3)
    )
    total = sum(lengths)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    def stream(n: int) -> Tensor:
        layout = draw(st.sampled_from(("bshd", "bhsd", "fused", "padded", "shared", "columns last")))
        if layout == "bhsd":
            return normal(batch, heads, n, dim).transpose(1, 2)
        if layout == "fused":
            return normal(batch, n, 3, heads, dim)[:, :, 1]
        if layout == "padded":
            return normal(batch, n, heads, dim + 3)[..., 1 : dim + 1]
        if layout == "shared":
            return normal(1, n, 1, dim).expand(batch, n, heads, dim)
        return (
            normal(batch, n, heads, dim) if layout == "bshd" else normal(batch, n, dim, heads).transpose(2, 3)
        )

    def offset(n: int) -> Tensor:
        shape = [size if chance(0.6) else 1 for size in (batch, n, heads, dim)]
        return normal(*shape[draw(st.integers(0, 3)) :], dtype=draw(st.sampled_from((dtype, torch.float32))))

    def weight() -> Tensor:
        return normal(dim, dtype=draw(st.sampled_from((dtype, torch.float32))))

    def angles() -> Tensor:
        return normal(total, 2, dim, dtype=dtype if chance(0.2) else torch.float32)[:, 1]

    permutation = None
    if chance(0.5):
        orders = [torch.randperm(total, generator=generator) for _ in range(batch)]
        permutation = torch.stack(orders) if chance(0.5) else orders[0]
        permutation = permutation.to(DEVICE, draw(st.sampled_from((torch.int32, torch.int64))))
    return Case(
        xs=[stream(n) for n in lengths],
        weights=[weight() if chance(0.7) else None for _ in lengths],
        offsets=[offset(n) if chance(0.4) else None for n in lengths],
        cos=angles() if rope else None,
        sin=angles() if rope else None,
        half=rope == "half" if rope else chance(0.5),
        permutation=permutation,
        parts=draw(st.sampled_from((1, 3, 1024))),
    )


class Truth:
    """The formula in float64, and beside it the sum of its terms' magnitudes, in which float32 rounding is
    measured.
    """

    def __init__(self, case: Case) -> None:
        def leaves(tensors: list) -> list:
            return [None if t is None else t.detach().double().requires_grad_() for t in tensors]

        self.case = case
        self.xs, self.weights, self.offsets = leaves(case.xs), leaves(case.weights), leaves(case.offsets)
        self.r = [(x.square().mean(3, keepdim=True) + case.eps).rsqrt() for x in self.xs]
        normed = [
            x if w is None else x * r * w for x, r, w in zip(self.xs, self.r, self.weights, strict=True)
        ]
        ys = [y if o is None else y + o for y, o in zip(normed, self.offsets, strict=True)]
        sizes = [y.abs() + (0 if o is None else o.abs()) for y, o in zip(normed, self.offsets, strict=True)]
        self.out = self.rotated(torch.cat(ys, 1), -1)
        self.size = self.rotated(torch.cat(sizes, 1), 1)

    def rotated(self, y: Tensor, sign: int) -> Tensor:
        """sign 1: of the magnitudes"""
        case = self.case
        if case.cos is not None and case.sin is not None:
            i, dim = torch.arange(y.shape[3], device=y.device), y.shape[3]
            first = i < dim // 2 if case.half else i % 2 == 0
            partner = (i + dim // 2) % dim if case.half else i ^ 1
            cos, sin = (
                t.double()[:, None] if sign < 0 else t.double()[:, None].abs() for t in (case.cos, case.sin)
            )
            y = y * cos + torch.where(first, sign, 1) * y[..., partner] * sin
        if case.permutation is None:
            return y
        orders = case.permutation.long().expand(y.shape[:2])
        return torch.stack([y[b, order] for b, order in enumerate(orders)])


def check(name: str, got: Tensor, exact: Tensor, size: Tensor, times: float = 8) -> None:
    """Half an ulp of the dtype, beyond `times` float32 roundings of the terms."""
    assert got.shape == exact.shape, name
    info = torch.finfo(got.dtype)
    half = torch.maximum(exact.abs() * info.eps, torch.full_like(exact, info.smallest_normal * info.eps)) / 2
    error, allowed = (got.double() - exact).abs(), half * (1 + 8 * EPS32) + times * EPS32 * size
    assert bool((error <= allowed).all()), (
        f"{name}: {float((error / allowed).nan_to_num(math.inf).max()):.3g} of what is allowed"
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(case: Case) -> None:
    truth = Truth(case)
    with poisoned():
        got = triton_norm_rope.forward(case.call)
    assert got.is_contiguous() and got.dtype == case.xs[0].dtype
    check("out", got, truth.out, truth.size)

    dout = torch.randn(got.shape, device=DEVICE).to(got.dtype)
    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(kernels, "MOST_PARTS", case.parts)
        grads: tuple = triton_norm_rope.backward(dout, case.call)
    dxs, dweights, doffsets = grads
    leaves = [t for t in (*truth.xs, *truth.weights, *truth.offsets) if t is not None]
    found = iter(torch.autograd.grad(truth.out, leaves, dout.double()))
    exact = [
        [None if t is None else next(found) for t in ts] for ts in (truth.xs, truth.weights, truth.offsets)
    ]
    plain = [torch.zeros_like(x, requires_grad=True) for x in truth.xs]
    sizes = torch.autograd.grad(truth.rotated(torch.cat(plain, 1), 1), plain, dout.double().abs())
    for i, (x, r, size) in enumerate(zip(truth.xs, truth.r, sizes, strict=True)):
        weight, offset = truth.weights[i], truth.offsets[i]
        if weight is not None:
            row = (size * weight.abs() * r).amax(3, keepdim=True) * (1 + (x.abs() * r).amax(3, keepdim=True))
            check(f"dweight {i}", dweights[i], exact[1][i], (size * x.abs() * r).sum((0, 1, 2)))
            check(f"dx {i}", dxs[i], exact[0][i], row.expand_as(x))
        else:
            assert dweights[i] is None
            check(f"dx {i}", dxs[i], exact[0][i], size)
        if offset is not None:
            assert doffsets[i].dtype == case.offsets[i].dtype
            check(f"doffset {i}", doffsets[i], exact[2][i], size.sum_to_size(offset.shape))
        else:
            assert doffsets[i] is None
        assert dxs[i].dtype == case.xs[i].dtype


# The interpreter takes some tenths of a second for a case.
@settings(max_examples=1000 if DEVICE == "cuda" else examples(100))
@given(cases())
def test_drawn_cases(case: Case) -> None:
    run(case)


def plain_case(
    dtype: torch.dtype, lengths: tuple[int, ...], heads: int, dim: int, half: bool, **more
) -> Case:
    xs = [torch.randn(1, n, heads, dim, device=DEVICE).to(dtype) for n in lengths]
    cos, sin = (torch.randn(sum(lengths), dim, device=DEVICE) for _ in range(2))
    weights = [torch.randn(dim, device=DEVICE).to(dtype) for _ in lengths]
    return Case(xs, weights, [None] * len(xs), cos, sin, half, None, **more)


@pytest.mark.parametrize("half", (False, True), ids=("interleaved", "half"))
def test_several_blocks_of_heads(half: bool) -> None:
    heads, dim = 19, 256
    assert kernels.norm_rope_blocks(heads, dim).heads < heads
    run(plain_case(torch.bfloat16, (1, 2), heads, dim, half, parts=4))


def test_the_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_PARTS", 300 if DEVICE == "cuda" else 3)
    case = plain_case(torch.float32, (700, 900) if DEVICE == "cuda" else (5, 3), 5, 128, False)
    dout = torch.randn(1, sum(x.shape[1] for x in case.xs), 5, 128, device=DEVICE)
    first, *others = (
        triton_norm_rope.backward(dout, case.call) for _ in range(50 if DEVICE == "cuda" else 2)
    )
    for again in others:
        for ones, twos in zip(first[:2], again[:2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ones, twos, strict=True))


def test_rows_of_zeros() -> None:
    """1 / rms of the unused rows of a block is infinite without eps, and of rows of zeros large with it."""
    case = plain_case(torch.float32, (3, 2), 3, 8, False)
    case.xs[0].zero_()
    run(case)
    bare = plain_case(torch.float32, (3, 2), 3, 8, False)
    bare.eps = 0.0
    run(bare)


def test_an_index_outside_gives_nan() -> None:
    case = plain_case(torch.float16, (3, 2), 2, 8, True)
    inside = triton_norm_rope.forward(case.call)
    out = torch.zeros_like(inside)
    index = torch.tensor([[4, 5, 0, -1, 2**40]], device=DEVICE)
    streams = case.xs, case.weights, case.offsets
    kernels.qk_norm_rope(*streams, case.cos, case.sin, index, out, EPS, case.half, interpreted())
    assert out[:, [1, 3, 4]].isnan().all()
    assert torch.equal(out[:, [0, 2]], inside[:, [4, 0]])


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function takes the Triton kernels, in the interpreter too."""
    monkeypatch.setitem(planner.FUSED, "cpu", triton)


def learning(case: Case, *names: str) -> list[tuple]:
    for name in names:
        setattr(case, name, [None if t is None else t.requires_grad_() for t in getattr(case, name)])
    return list(zip(case.xs, case.weights, case.offsets, strict=True))


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    "names", (("xs",), ("xs", "weights"), ("offsets",), ("xs", "weights", "offsets")), ids=" ".join
)
def test_public_function_differentiates_what_learns(names: tuple[str, ...]) -> None:
    case = plain_case(torch.float32, (3, 2), 2, 8, False)
    case.offsets[1] = torch.randn(2, 8, device=DEVICE)
    case.permutation = torch.randperm(5, device=DEVICE)
    parts = learning(case, *names)
    out = fb.qk_norm_rope(parts, case.cos, case.sin, eps=EPS, permutation=case.permutation)
    assert torch.equal(out, triton_norm_rope.forward(case.call))
    dout = torch.randn_like(out)
    out.backward(dout)
    grads = triton_norm_rope.backward(dout, case.call)
    for name, expected in zip(("xs", "weights", "offsets"), grads, strict=True):
        for t, d in zip(getattr(case, name), expected, strict=True):
            assert t is None or (torch.equal(t.grad, d) if name in names else t.grad is None)


@pytest.mark.usefixtures("chosen")
def test_operators_keep_their_promises() -> None:
    case = plain_case(torch.float32, (3, 2), 2, 8, True)
    case.weights[0], case.offsets[1] = None, torch.randn(2, 1, 8, device=DEVICE)
    ops = torch.ops.flashbrush
    torch.library.opcheck(ops.qk_norm_rope.default, (case.xs, case.weights, case.offsets, *case.tables))
    dout = torch.randn(1, 5, 2, 8, device=DEVICE)
    arguments = dout, case.xs, case.weights, case.offsets, *case.tables
    torch.library.opcheck(ops.qk_norm_rope_backward.default, (*arguments, True))
    light = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.qk_norm_rope_backward.default, (*arguments, False), test_utils=light)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are what a GPU's tensors take")
def test_the_interpreter_is_not_chosen() -> None:
    assert interpreted()
    assert planner.choose("qk_norm_rope", torch.device("cpu"), [torch.zeros(1, 1, 1, 8)])[0] is not triton


@pytest.mark.parametrize("heads", (1, 2, 3, 8, 20, 24, 38, 64))
@pytest.mark.parametrize("dim", (1, 2, 5, 32, 40, 64, 96, 128, 160, 256))
def test_blocks_hold_4096_numbers(heads: int, dim: int) -> None:
    blocks = kernels.norm_rope_blocks(heads, dim)
    assert all(n > 0 and n & (n - 1) == 0 for n in blocks)
    assert dim <= 2 * blocks.pairs and blocks.tokens * blocks.heads * blocks.pairs * 2 <= 4096
    assert blocks.heads < 2 * heads


def test_alignment_is_that_of_the_worst_row() -> None:
    def align(*tensors: Tensor) -> int:
        return kernels._traits(tensors, [None], [None], True, False)[0].ALIGN

    x = torch.zeros(2, 4, 3, 64, dtype=torch.bfloat16)
    assert x.data_ptr() % 16 == 0
    assert align(x) == align(x, x[:, :, 1:]) == align(x[..., 8:40]) == 16
    assert align(x, x[..., 4:]) == align(torch.zeros(2, 4, 3, 20, dtype=torch.bfloat16)) == 8
    assert align(x[..., 1:33]) == align(torch.zeros(2, 4, 3, 33, dtype=torch.bfloat16)[..., :32]) == 2
    assert (
        align(torch.zeros(1, 4, 1, 32, dtype=torch.bfloat16).as_strided((1, 4, 1, 32), (1, 32, 1, 1))) == 16
    )


# What the kernels compile to: rows of D 128 in 16-byte reads and writes, from either of two streams


@pytest.mark.compiled
def test_rows_are_read_and_written_whole() -> None:
    cases = [("norm_rope", variant, 128, "bfloat16") for variant in ("interleaved", "backward interleaved")]
    reports = [kernel for report in compile_elsewhere("sm_90", cases) for kernel in report["kernels"]]
    assert [r["kernel"] for r in reports] == [
        "qk_norm_rope_kernel",
        "qk_norm_rope_backward_kernel",
        "sum_dweight_kernel",
    ]
    for report in reports:
        assert report["spills"] == 0, report
        if report["kernel"] != "sum_dweight_kernel":
            # 32 numbers a thread: 4 reads of x, and of dout; 4 writes of out or dx.
            rows = 4 if report["kernel"] == "qk_norm_rope_kernel" else 8
            assert report["wide reads"] >= rows and report["wide writes"] >= 4, report
            assert report["narrow writes"] <= 1 and report["narrow reads"] <= 4, report  # weights, cos, sin

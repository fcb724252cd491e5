"""blend_latents in Triton against float64, bitwise where it promises so: in Triton's interpreter where there
is no GPU.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import flashbrush as fb
from flashbrush.bindings.backends import planner, triton as backend
from flashbrush.bindings.backends.gpu.eligibility import emulated
from flashbrush.bindings.backends.interface import Operator
from flashbrush.kernels.blend_latents import BLOCK, blend_latents
from flashbrush.kernels.strides import collapse
from support.calls import examples

pytestmark = pytest.mark.skipif(bool(backend.available()), reason="; ".join(backend.available()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU take the Triton kernels too, in the interpreter."""
    monkeypatch.setitem(planner.FUSED, "cpu", backend)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def strided(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers in some order of dimensions, perhaps a crop of more of them."""
    order = draw(st.permutations(range(len(shape))))
    crop = draw(st.sampled_from((0, 0, 3)))
    t = torch.randn([shape[d] for d in order[:-1]] + [shape[order[-1]] + crop])[..., crop:].to(dtype)
    return t.permute([order.index(d) for d in range(len(shape))])


@st.composite
def blends(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, float | Tensor]:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from(((1,), (3,), (2, 1100), (2, 37, 5), (3, 4, 7, 9), (2, 1, 4, 3, 5))))
    generated = strided(draw, shape, dtype)
    source, noise = (
        strided(draw, (draw(st.sampled_from((1, shape[0]))), *shape[1:]), dtype) for _ in range(2)
    )
    mask_shape = [draw(st.sampled_from((1, size))) for size in shape][draw(st.integers(0, len(shape) - 1)) :]
    mask = torch.rand(mask_shape)
    mask_dtype = draw(st.sampled_from((torch.bool, *DTYPES, torch.float64)))
    if mask_dtype == torch.bool:
        mask = mask < 0.5
    else:
        ends = torch.rand(mask_shape)
        mask = torch.where(ends < 0.3, 0.0, torch.where(ends > 0.7, 1.0, mask)).to(mask_dtype)
    kind = draw(st.sampled_from(("number", "tensor", "items")))
    sigma = draw(st.sampled_from((0.0, 1.0, 0.3)))
    if kind == "number":
        return generated, source, noise, mask, sigma
    sigmas = torch.rand(shape[0])
    sigmas[0] = sigma
    sigmas = sigmas.to(draw(st.sampled_from((*DTYPES, torch.float64))))
    return generated, source, noise, mask, sigmas if kind == "items" else sigmas[0]


@settings(max_examples=400 if DEVICE == "cuda" else examples(60))
@given(blends())
def test_drawn_blends(call: tuple[Tensor, Tensor, Tensor, Tensor, float | Tensor]) -> None:
    generated, source, noise, mask, sigma = (t.to(DEVICE) if isinstance(t, Tensor) else t for t in call)
    emulate = emulated(generated)
    byte_mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    out = torch.full_like(generated, math.nan)
    blend_latents(out, generated, source, noise, byte_mask, sigma, emulate)

    level = torch.as_tensor(sigma).double().reshape(-1, *[1] * (generated.dim() - 1)).to(DEVICE)
    share = mask.double()
    exact = share * generated.double() + (1 - share) * (
        (1 - level) * source.double() + level * noise.double()
    )
    assert out.isfinite().all()
    # float32 arithmetic, and one rounding
    size = max(float(t.double().abs().max()) for t in (generated, source, noise))
    bar = torch.finfo(out.dtype).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps * size
    assert ((out.double() - exact).abs() <= bar).all()
    for where, expected in (
        (share == 1, generated),
        ((share == 0) & (level == 0), source),
        ((share == 0) & (level == 1), noise),
    ):
        where = where.expand_as(out)
        assert torch.equal(bits(out)[where], bits(expected.expand_as(out))[where])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tensor", (False, True), ids=("number", "tensor"))
def test_bits_pass_and_nothing_leaks(dtype: torch.dtype, tensor: bool, through_triton: None) -> None:
    """Signed zeros and the payload of a NaN are kept; what the mask and the ends hide may be anything."""
    generated, source, noise = (torch.randn(2, 3, 5).to(dtype).to(DEVICE) for _ in range(3))
    generated[0, 0, :3], source[1, 0, :3] = (
        torch.tensor([-0.0, math.nan, math.inf]),
        torch.tensor([-0.0, -math.nan, 1.0]),
    )
    mask = torch.zeros(2, 1, 1, device=DEVICE)
    mask[0] = 1
    source[0], noise[:] = math.nan, math.inf
    sigma = torch.zeros(2, device=DEVICE) if tensor else 0
    for given_mask in (mask, mask.bool()):
        got = fb.blend_latents(generated, source, noise, given_mask, sigma)
        assert torch.equal(bits(got[0]), bits(generated[0])) and torch.equal(bits(got[1]), bits(source[1]))


def test_layouts(through_triton: None) -> None:
    """The result has the layout of `generated`; only strides that do not fold go to torch."""
    image = torch.randn(2, 4, 6, 8, device=DEVICE).to(memory_format=torch.channels_last)
    mask = torch.rand(1, 1, 6, 8, device=DEVICE)
    launched = []
    run, why_not = backend.OPERATORS["blend_latents"]
    spy = Operator(lambda *args: (launched.append(args), run(*args))[1], why_not)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backend.OPERATORS, "blend_latents", spy)
        got = fb.blend_latents(image, -image, 2 * image, mask, 0.25)
        assert got.is_contiguous(memory_format=torch.channels_last) and len(launched) == 1
        torch.testing.assert_close(got, mask * image + (1 - mask) * (-0.25 * image))
        crop = torch.randn(3, 3, 3, 3, 3, 3, device=DEVICE)[:2, :2, :2, :2, :2, :2]
        got = fb.blend_latents(crop, -crop, crop, torch.zeros((), device=DEVICE), 0.25)
        assert len(launched) == 1
        torch.testing.assert_close(got, -0.5 * crop)
        empty = torch.empty(0, 3, device=DEVICE)
        assert fb.blend_latents(empty, empty, empty, mask[0, 0, 0, 0], 0.5).shape == (0, 3)


def test_blocks_beyond_the_first(through_triton: None) -> None:
    generated, source, noise = (torch.randn(1, 2 * BLOCK + 7, device=DEVICE) for _ in range(3))
    mask = torch.rand(2 * BLOCK + 7, device=DEVICE) < 0.5
    assert torch.equal(
        fb.blend_latents(generated, source, noise, mask, 0), torch.where(mask, generated, source)
    )


def test_compiles_whole(through_triton: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fb.blend_latents, fullgraph=True, backend="aot_eager")
    generated, source, noise = (torch.randn(2, 6, 8, device=DEVICE) for _ in range(3))
    mask, sigma = torch.rand(2, 6, 1, device=DEVICE), torch.tensor([0.0, 0.25], device=DEVICE)
    expected = fb.blend_latents(generated, source, noise, mask, sigma)
    assert torch.equal(compiled(generated, source, noise, mask, sigma), expected)
    arguments = (generated, source[:1], noise, mask, sigma, 0.0)
    torch.library.opcheck(torch.ops.flashbrush.blend_latents.default, arguments)


@given(st.data())
def test_a_walk_visits_every_element_of_all_tensors_together(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    tensors = [strided(data.draw, shape, torch.float32).stride() for _ in range(2)]
    tensors.append(tuple(stride * data.draw(st.integers(0, 1)) for stride in tensors[0]))
    walk = collapse(shape, *tensors)
    places = sorted(
        tuple(sum(i * s for i, s in zip(index, strides, strict=True)) for strides in tensors)
        for index in itertools.product(*map(range, shape))
    )
    walked = sorted(
        tuple(sum(i * (s or 0) for i, s in zip(index, strides, strict=True)) for strides in walk.strides)
        for index in itertools.product(*map(range, walk.sizes))
    )
    assert walked == places
    assert len(walk.sizes) <= max(1, sum(size > 1 for size in shape))


def test_folding() -> None:
    dense = (3072, 768, 64, 1)
    assert collapse((2, 4, 12, 64), dense, dense) == ((6144,), ((1,), (1,)), False)
    assert collapse((2, 4, 12, 64), dense, (48, 12, 1, 0)) == ((96, 64), ((64, 1), (1, None)), False)
    assert collapse((1, 1), (1, 1)) == ((1,), ((None,),), False)
    assert collapse((4, 2**30), (2**30, 1)).wide and collapse((2, 3), (2**31, 1)).wide

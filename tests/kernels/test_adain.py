"""adain in Triton against float64, large means and masks included: in Triton's interpreter where there is no
GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import flashbrush as fb
from flashbrush.bindings.backends import planner, triton as backend
from flashbrush.bindings.backends.composed.adain import adain as composed
from flashbrush.bindings.backends.gpu.eligibility import emulated
from flashbrush.bindings.backends.interface import Operator
from flashbrush.bindings.operators.adain import EPS
from flashbrush.kernels.adain import MOST_CHUNKS, adain_apply, adain_statistics, tile_of, walk_space
from support.calls import examples

pytestmark = pytest.mark.skipif(bool(backend.available()), reason="; ".join(backend.available()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU take the Triton kernels too, in the interpreter."""
    monkeypatch.setitem(planner.FUSED, "cpu", backend)


def check(x: Tensor, style: Tensor, mask: Tensor | None, style_mask: Tensor | None) -> None:
    out = torch.full_like(x, math.nan)
    masks = [None if m is None else m.view(torch.uint8) for m in (mask, style_mask)]
    sums, style_sums = adain_statistics(x, masks[0]), adain_statistics(style, masks[1])
    adain_apply(out, x, masks[0], sums, style_sums, EPS, emulated(x))
    exact = composed(x.double(), style.double(), mask, style_mask, EPS)
    assert out.isfinite().all()
    inside = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
    # one rounding to the dtype; before it float32, with errors against the size of deviations, not of the
    # mean
    got, wanted = out[inside].double(), exact[inside]
    spread = 8 * torch.finfo(torch.float32).eps * max(1.0, float((wanted - wanted.mean()).abs().max()))
    assert ((got - wanted).abs() <= torch.finfo(x.dtype).eps * wanted.abs() * 0.5001 + spread).all()
    assert torch.equal(out[~inside], x[~inside])


@st.composite
def images(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from(DTYPES))
    channels = draw(st.sampled_from((1, 3)))
    mean = draw(st.sampled_from((0.0, -3.0, 1000.0)))
    items = draw(st.sampled_from((1, 2)))
    made = []
    for batch in (items, draw(st.sampled_from((1, items)))):
        space = draw(st.sampled_from(((2,), (7,), (11, 13), (3, 5, 6), (1, 1030))))
        order = draw(st.sampled_from(("contiguous", "channels last", "turned", "crop")))
        x = torch.randn(batch, channels, *space) + mean
        if order == "channels last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif order == "turned":
            x = torch.randn(batch, channels, *space[::-1]).permute(0, 1, *range(len(space) + 1, 1, -1)) + mean
        elif order == "crop":
            x = (torch.randn(batch, channels, *space[:-1], space[-1] + 3) + mean)[..., 3:]
        mask = None
        if draw(st.booleans()):
            mask = torch.rand(draw(st.sampled_from((1, batch))), 1, *space) < 0.4
            mask.flatten(1)[:, -2:] = True
        made.append((x.to(dtype), mask))
    (x, mask), (style, style_mask) = made
    return x, style, mask, style_mask


@settings(max_examples=400 if DEVICE == "cuda" else examples(15))
@given(images())
def test_drawn_images(images: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> None:
    check(*(t if t is None else t.to(DEVICE) for t in images))


def test_several_chunks_of_several_blocks() -> None:
    x, style = (
        torch.randn(1, 1, 1024 * MOST_CHUNKS + 5, device=DEVICE) + 3e4,
        torch.randn(1, 1, 3000, device=DEVICE),
    )
    tile = tile_of(walk_space(x, None), 1, x.stride(1))
    assert tile.chunk > tile.space and 1 < tile.chunks <= MOST_CHUNKS
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[..., : 2 * tile.chunk + tile.space] = False  # whole chunks and blocks that count nothing
    check(x + torch.linspace(-2, 2, x.shape[2], device=DEVICE), style, mask, None)


def test_the_same_bits_twice(through_triton: None) -> None:
    x, style = (torch.randn(1, 2, 50, 40, device=DEVICE) for _ in range(2))
    assert torch.equal(fb.adain(x, style), fb.adain(x, style))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_outside_a_mask_do_not_count(dtype: torch.dtype, through_triton: None) -> None:
    x, style = (torch.randn(1, 2, 4, 4).to(dtype).to(DEVICE) for _ in range(2))
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=DEVICE)
    mask[..., :2] = True
    clean = fb.adain(x, style, mask, mask)
    spoilt = [torch.where(mask, t, torch.tensor(math.nan, dtype=dtype, device=DEVICE)) for t in (x, style)]
    got = fb.adain(*spoilt, mask, mask)
    assert torch.equal(got[..., :2], clean[..., :2]) and got[..., 2:].isnan().all()


def test_layouts(through_triton: None) -> None:
    """The result has the layout of x; strides that do not fold go to torch, and nothing else does."""
    launched = []
    run, why_not = backend.OPERATORS["adain"]
    spy = Operator(lambda *args: (launched.append(args), run(*args))[1], why_not)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backend.OPERATORS, "adain", spy)
        x = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
        got = fb.adain(x, x[:1].contiguous())
        assert got.is_contiguous(memory_format=torch.channels_last) and len(launched) == 1
        torch.testing.assert_close(got, composed(x, x[:1], None, None, EPS))
        crop = torch.randn(1, 2, 3, 3, 3, 3, 3, device=DEVICE)[..., :2, :2, :2, :2, :2]
        torch.testing.assert_close(fb.adain(crop, x[:1, :2]), composed(crop, x[:1, :2], None, None, EPS))
        assert len(launched) == 1
        assert fb.adain(x[:0], x[:1]).shape == (0, 3, 4, 5)


def test_compiles_whole(through_triton: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fb.adain, fullgraph=True, backend="aot_eager")
    x, style = torch.randn(1, 2, 4, 5, device=DEVICE), torch.randn(1, 2, 42, device=DEVICE)
    mask = torch.rand(1, 1, 4, 5, device=DEVICE) < 0.7
    assert torch.equal(compiled(x, style, mask), fb.adain(x, style, mask))
    torch.library.opcheck(torch.ops.flashbrush.adain.default, (x, style, mask, None))

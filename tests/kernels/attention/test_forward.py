"""The Triton forward kernel against the reference in float64; in Triton's interpreter where no GPU is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import flashbrush as fb
from flashbrush.bindings.backends import triton as triton_package
from flashbrush.kernels.attention import tiles as attention_tiles
from flashbrush.kernels.attention.arguments import MatrixDescriptor
from support.calls import Call, examples, random_calls
from support.error_bars import check_result

pytestmark = pytest.mark.skipif(
    bool(triton_package.available()), reason="; ".join(triton_package.available())
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(call: Call) -> None:
    if DEVICE == "cuda":
        call = call.on(torch.device(DEVICE))
    out = torch.full_like(call.run("reference"), float("nan"))
    _, stats = call.run("triton", return_stats=True, out=out)
    check_result(call, out, stats)
    check_result(call, call.run("triton"))


# The interpreter takes a second or two for a call.
@settings(max_examples=400 if DEVICE == "cuda" else examples(45))
@given(random_calls(longest=70, dims=(3, 16, 40, 64, 80, 128)))
def test_drawn_calls(call: Call) -> None:
    run(call)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        *((dim, dtype) for dim in (64, 96) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        (160, torch.bfloat16),
        (256, torch.float16),
    ],
    ids=str,
)
def test_several_tiles(dim: int, dtype: torch.dtype) -> None:
    rows, keys = fb.Segments(a=130, b=40), fb.Segments(c=65, d=1, e=129)
    control = fb.Control(
        rows,
        keys,
        weight={("a", "d"): 1.3, ("b", "e"): 0.0},
        bias={("b", "c"): -1.0},
        head_gain=fb.HeadGain(rows="a", keys="c"),
    )
    q, k, v = (torch.randn(1, n, h, dim).to(dtype) for n, h in ((170, 2), (195, 1), (195, 1)))
    run(Call(q, k, v, control, {}))


@pytest.mark.parametrize("layout", ("heads in a row", "heads in rows"))
@pytest.mark.parametrize("dim", (16, 64))
def test_tensor_descriptors(dim: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention_tiles.forward_tile
    monkeypatch.setattr(
        attention_tiles, "forward_tile", lambda *args, **more: plain(*args, **more)._replace(descriptors=True)
    )
    made = []
    make = MatrixDescriptor.make
    monkeypatch.setattr(MatrixDescriptor, "make", lambda *args: (made.append(args), make(*args))[1])
    segments = fb.Segments(a=70, b=3, c=60)
    control = fb.Control(segments, weight={("a", "b"): 1.3}, valid={"c": torch.tensor([60, 7])})
    tensors = [torch.randn(2, 133, heads, dim, dtype=torch.float16) for heads in (4, 2, 2)]
    if layout == "heads in rows":
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    run(Call(*tensors, control, {}))
    assert len(made) == 4  # k and v of two calls

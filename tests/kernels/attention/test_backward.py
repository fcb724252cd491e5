"""The Triton gradient kernels against autograd of the float64 reference: in the interpreter where there is no
GPU.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import flashbrush as fb
from flashbrush.bindings.backends import triton as triton_package
from support.calls import Call, examples, random_calls
from support.gradients import check_gradients, gradients

pytestmark = pytest.mark.skipif(
    bool(triton_package.available()), reason="; ".join(triton_package.available())
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@settings(max_examples=300 if DEVICE.type == "cuda" else examples(25))
@given(
    random_calls(
        longest=70, dims=(3, 16, 40, 64, 80, 128), contrast=False, weights=(0.0, 0.25, 0.7, 1.0, 1.3, 4.0)
    )
)
def test_drawn_calls(call: Call) -> None:
    check_gradients(call.on(DEVICE), "triton")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dim", (64, 80))
def test_several_tiles(dim: int, dtype: torch.dtype) -> None:
    rows, keys = fb.Segments(a=130, b=40), fb.Segments(c=165, d=1, e=3, f=129)
    control = fb.Control(
        rows,
        keys,
        weight={("a", "d"): 1.3, ("b", "f"): 0.0},
        bias={("b", "c"): -1.0, ("a", "e"): -torch.inf},
        head_gain=fb.HeadGain(rows="a", keys="c"),
    )
    q, k, v = (torch.randn(1, n, h, dim).to(dtype) for n, h in ((170, 2), (298, 1), (298, 1)))
    check_gradients(Call(q, k, v, control, {}).on(DEVICE), "triton")


def test_same_bits_twice() -> None:
    q, k, v = (torch.randn(1, 100, h, 32, device=DEVICE) for h in (2, 1, 1))
    source = {"q": torch.tensor([0, 0, 0]), "k": torch.tensor([0, 0, 0]), "v": torch.tensor([0, 0, 0])}
    call = Call(q, k, v, None, {"source": source}).on(DEVICE)
    dout = torch.randn(3, 100, 2, 32, device=DEVICE)
    first, second = gradients(call, "triton", dout), gradients(call, "triton", dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

"""qk_norm_rope() of the C++ backend and its gradient against float64, on each instruction set of this CPU."""

from __future__ import annotations

import pytest
import torch

import flashbrush as fb
from flashbrush.bindings.backends.composed import qk_norm_rope as composed
from flashbrush.bindings.backends.cpu import library as cpu
from flashbrush.bindings.core.norm_rope import NormRope
from support.token_streams import EPS, streams, tables


@pytest.mark.parametrize("rope", ("interleaved", "half"))
def test_instruction_sets(isa: str, rope: str) -> None:
    cos, sin = tables(160, 40, rope)
    permutation = torch.stack([torch.randperm(160) for _ in range(2)])
    for dtype in cpu.DTYPES:
        # 40 is no multiple of a vector; 160 tokens of 11 heads are enough work for several threads
        parts = streams(37, 60, 63, dtype=dtype, heads=11, dim=40)
        xs = [x.requires_grad_() for x, _, _ in parts]
        weights = [None if w is None else w.requires_grad_() for _, w, _ in parts]
        got = fb.qk_norm_rope(parts, cos, sin, eps=EPS, rope=rope, permutation=permutation)
        wide = [[None if t is None else t.detach().double().requires_grad_() for t in part] for part in parts]
        args = ([part[i] for part in wide] for i in range(3))
        call = NormRope(*args, cos.double(), sin.double(), EPS, rope == "half", permutation)
        truth = composed.forward(call)
        dout = torch.randn_like(got)
        got.backward(dout)
        truth.backward(dout.double())
        pairs = [(got, truth)]
        for x, weight, (x64, weight64, _) in zip(xs, weights, wide, strict=True):
            pairs += [
                (a.grad, b.grad) for a, b in ((x, x64), (weight, weight64)) if a is not None and b is not None
            ]
        for ours, exact in pairs:
            ulp = torch.finfo(dtype).eps * exact.abs().max()
            assert (ours - exact).abs().max() <= (2 if dtype == torch.float32 else 0.51) * ulp

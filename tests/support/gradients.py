"""Gradients of drawn calls against autograd of the float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .problems import Call

# P and dS are rounded to the dtype once, products are summed in float32: relative error of the root mean
# square.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 3e-3}


def gradients(call: Call, backend: str, dout: Tensor) -> list[Tensor]:
    leaves = []
    for t in (call.q, call.k, call.v):
        leaves += [x.detach().requires_grad_() for x in (t if isinstance(t, list) else [t])]
    n = len(call.k) if isinstance(call.k, list) else 1
    k, v = leaves[1 : 1 + n], leaves[1 + n :]
    single = not isinstance(call.k, list)
    own = Call(leaves[0], k[0] if single else k, v[0] if single else v, call.control, call.kwargs)
    out = own.run(backend)
    if not out.requires_grad:  # a call without rows or keys
        return [torch.zeros_like(t) for t in leaves]
    return list(torch.autograd.grad(out, leaves, dout.to(out.dtype)))


def check_gradients(call: Call, backend: str) -> None:
    out, stats = call.run("reference", return_stats=True)
    top = float(stats.gain.abs().max()) if stats.gain.numel() else 1.0
    if call.control is not None and call.control.weight is not None:
        top *= max(1.0, float(call.control.weight.max()))
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(call.q.dtype)
    expected = gradients(call.to(torch.float64), "reference", dout.double())
    for got, truth, name in zip(gradients(call, backend, dout), expected, names(call), strict=True):
        assert got.dtype == call.q.dtype and got.shape == truth.shape
        assert bool(torch.isfinite(got).all()), f"d{name} is not finite"
        if truth.numel() == 0:
            continue
        scale = max(
            float(truth.pow(2).mean().sqrt()),
            FLOOR * max(1.0, top) * float(dout.double().pow(2).mean().sqrt()),
        )
        error = float((got.double() - truth).pow(2).mean().sqrt())
        few = 3 if truth.numel() < 512 else 1  # a handful of numbers is no sample of an error
        assert error <= few * LIMIT[call.q.dtype] * scale, f"d{name}: error {error:.3g} of {scale:.3g}"


# dq and dk nearly cancel where a row has one key or weighs all alike; their error is then that of the terms.
FLOOR = 0.3


def names(call: Call) -> list[str]:
    n = len(call.k) if isinstance(call.k, list) else 1
    return ["q", *(f"k{i}" for i in range(n)), *(f"v{i}" for i in range(n))]

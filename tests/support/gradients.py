"""Gradients of attention against autograd of the float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Call
from .error_bars import check_error, rounding_slack

# Relative error of the root mean square: P and dS are rounded to the dtype once, sums are float32.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 3e-3}
# The least root mean square that the limit refers to, in units of dout's. dq and dk nearly cancel where a row
# has one key or weighs all its keys alike; their error is then that of the terms.
SMALLEST_SCALE = 0.3


def gradients(call: Call, backend: str, dout: Tensor) -> list[Tensor]:
    """Of out against dout (batch, rows, heads, dim): for q, every key tensor and every value tensor."""
    leaves = []
    for t in (call.q, call.k, call.v):
        leaves += [x.detach().requires_grad_() for x in (t if isinstance(t, list) else [t])]
    listed = isinstance(call.k, list)
    n = len(call.k) if listed else 1
    k, v = leaves[1 : 1 + n], leaves[1 + n :]
    out = Call(leaves[0], k if listed else k[0], v if listed else v[0], call.control, call.kwargs).run(
        backend
    )
    if not out.requires_grad:  # a call without rows or keys
        return [torch.zeros_like(t) for t in leaves]
    return list(torch.autograd.grad(out, leaves, dout.to(out.dtype)))


def tensor_names(call: Call) -> list[str]:
    n = len(call.k) if isinstance(call.k, list) else 1
    return ["q", *(f"k{i}" for i in range(n)), *(f"v{i}" for i in range(n))]


def check_gradients(call: Call, backend: str) -> None:
    """For kernels: the root mean square of each gradient's error is within LIMIT of its dtype."""
    out, stats = call.run("reference", return_stats=True)
    largest_factor = float(stats.gain.abs().max()) if stats.gain.numel() else 1.0
    if call.control is not None and call.control.weight is not None:
        largest_factor *= max(1.0, float(call.control.weight.max()))
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(call.q.dtype)
    smallest = SMALLEST_SCALE * max(1.0, largest_factor) * root_mean_square(dout)
    expected = gradients(call.to(torch.float64), "reference", dout.double())
    for got, truth, name in zip(gradients(call, backend, dout), expected, tensor_names(call), strict=True):
        assert got.dtype == call.q.dtype and got.shape == truth.shape
        assert bool(torch.isfinite(got).all()), f"d{name} is not finite"
        if truth.numel() == 0:
            continue
        scale = max(root_mean_square(truth), smallest)
        error = root_mean_square(got.double() - truth)
        factor = 3 if truth.numel() < 512 else 1  # few elements are too small a sample of an error
        assert error <= factor * LIMIT[call.q.dtype] * scale, f"d{name}: error {error:.3g} of {scale:.3g}"


def root_mean_square(t: Tensor) -> float:
    return float(t.double().pow(2).mean().sqrt())


def check_gradients_against_eager(call: Call, backend: str) -> None:
    """For torch operators: mean and largest error are at most twice those of eager autograd."""
    exact = call.to(torch.float64)
    out = call.run(backend)
    dout = torch.randn(out.shape).to(out.dtype)
    truths = gradients(exact, "reference", dout.double())
    eagers, ours = (gradients(call, name, dout) for name in ("reference", backend))
    eps = torch.finfo(out.dtype).eps
    for name, truth, eager, got in zip(tensor_names(call), truths, eagers, ours, strict=True):
        assert got.dtype == out.dtype and got.shape == truth.shape and bool(torch.isfinite(got).all()), name
        if not truth.numel() or not dout.numel():
            continue
        slack = 0.5 * eps * float(truth.abs().max())
        slack += 4 * rounding_slack(exact, call, out.numel()) * float(dout.abs().max())
        check_error(f"d{name}", got, eager, truth, slack)

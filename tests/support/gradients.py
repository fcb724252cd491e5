"""Gradients of attention against autograd of the float64 reference."""

from __future__ import annotations

import torch
from pytest import MonkeyPatch
from torch import Tensor

from flashbrush.bindings.backends import reference

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


def sums_of_magnitudes(call: Call, dout: Tensor) -> list[Tensor]:
    """The sum of the magnitudes of the terms of each element of dq and of every dk; call and dout in float64.

    dS_ij = p_ij (g_ij - sum_l p_il g_il), where g is the gradient of p. A backward pass rounds P, the sum (as
    out) and dS to q's dtype, so an element's error is at most 3 eps / 2 of this.
    """
    softmax = reference.masked_softmax
    terms: list[Tensor] = []  # of dS, for each group: (batch, heads, rows, keys)

    def record_terms(s: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        prob, lse = softmax(s, allowed)
        p = prob.detach()
        prob.register_hook(lambda g: terms.append(p * (g.abs() + (p * g.abs()).sum(-1, keepdim=True))))
        return prob, lse

    logits: list[Tensor] = []  # of abs(q) and abs(k), the same for each group

    def record_logits(s: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        logits.append(s)
        return softmax(s, allowed)

    with MonkeyPatch.context() as patch:
        patch.setattr(reference, "masked_softmax", record_terms)
        gradients(call, "reference", dout)
        patch.setattr(reference, "masked_softmax", record_logits)
        leaves = [
            x.abs().requires_grad_() for x in (call.q, *(call.k if isinstance(call.k, list) else [call.k]))
        ]
        k = leaves[1:] if isinstance(call.k, list) else leaves[1]
        Call(leaves[0], k, call.v, call.control, call.kwargs).run("reference")
    return list(torch.autograd.grad(logits[0], leaves, sum(terms, torch.zeros_like(logits[0]))))


def check_gradients(call: Call, backend: str) -> None:
    """For kernels: the root mean square of each gradient's error is within LIMIT of its dtype.

    Tensors of few elements are too small a sample for that: there an error within three roundings of every
    term passes too.
    """
    out, stats = call.run("reference", return_stats=True)
    largest_factor = float(stats.gain.abs().max()) if stats.gain.numel() else 1.0
    if call.control is not None and call.control.weight is not None:
        largest_factor *= max(1.0, float(call.control.weight.max()))
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(call.q.dtype)
    smallest = SMALLEST_SCALE * max(1.0, largest_factor) * root_mean_square(dout)
    exact = call.to(torch.float64)
    expected = gradients(exact, "reference", dout.double())
    ours = gradients(call, backend, dout)
    for i, (got, truth, name) in enumerate(zip(ours, expected, tensor_names(call), strict=True)):
        assert got.dtype == call.q.dtype and got.shape == truth.shape
        assert bool(torch.isfinite(got).all()), f"d{name} is not finite"
        if truth.numel() == 0:
            continue
        scale = max(root_mean_square(truth), smallest)
        error = root_mean_square(got.double() - truth)
        few = truth.numel() < 512
        limit = (3 if few else 1) * LIMIT[call.q.dtype] * scale
        if error > limit and few and not name.startswith("v"):
            sums = sums_of_magnitudes(exact, dout.double())
            limit = 3 * torch.finfo(call.q.dtype).eps / 2 * root_mean_square(sums[i])
        assert error <= limit, f"d{name}: error {error:.3g} of {scale:.3g}, limit {limit:.3g}"


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

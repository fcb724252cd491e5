"""Every feature of attention, forward and backward, against float64; outputs hold NaN before the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...bindings import HeadGain, attention
from ..cases.float64_check import (
    FeatureCall,
    WrongResult,
    compare,
    eager_output,
    exact_answer,
    largest_term_sum,
)
from ..timing.rows import Row, dtype_name
from .features import DIFFERENTIABLE, FEATURES, ROWS, SHIFT, FeatureSampler, draw_feature
from .setup import Setup, judged

DIMS = (32, 40, 64, 80, 96, 128, 160, 256)
# lse, mass and gain are computed from products of the inputs before any rounding: float32 accuracy in every
# dtype.
STATISTICS = {"lse": 3e-5, "mass": 3e-5, "gain": 1.5e-3}
FORWARD_GROUPS = {f"features {i + 1}": tuple(FEATURES)[i::3] for i in range(3)}
Check = Callable[[Setup, str], Row]


@torch.no_grad()
def features(setup: Setup, names: tuple[str, ...]) -> Row:
    """Features in bfloat16 at head dim 128 (in a dry run 32)."""
    return _row(setup, {name: _forward(name, torch.bfloat16, 32 if setup.dry else 128) for name in names})


@torch.no_grad()
def dims_and_dtypes(setup: Setup) -> Row:
    """In-Context Brush at every fast head dim and an odd one in bfloat16, and in the other dtypes."""
    cases = [("brush", torch.bfloat16, dim) for dim in ((40,) if setup.dry else (*DIMS, 72)) if dim != 128]
    cases += [
        ("brush", dtype, dim)
        for dtype in (torch.float16, torch.float32)
        for dim in (64, 128)[: 2 - setup.dry]
    ]
    return _row(setup, {f"{a}, {dtype_name(t)}, D {d}": _forward(a, t, d) for a, t, d in cases})


@torch.no_grad()
def repeats(setup: Setup) -> Row:
    """A thousand calls on the same inputs must agree bit by bit, which reveals reads of unwritten memory."""
    dims = (32,) if setup.dry else (64, 128)
    return _row(setup, {f"{setup.backend}, D {dim}, repeated": _repeated(dim) for dim in dims})


def gradients(setup: Setup) -> Row:
    """dq, dk and dv of the differentiable features in bfloat16 at head dim 128, of one in float32 at 64."""
    dim = 32 if setup.dry else 128
    cases = {f"{name}, backward": _backward(name, torch.bfloat16, dim) for name in DIFFERENTIABLE}
    cases["shift, float32, D 64, backward"] = _backward("shift", torch.float32, 64)
    with torch.enable_grad():
        return _row(setup, cases)


def _row(setup: Setup, cases: dict[str, Check]) -> Row:
    row: Row = {"section": "checks"}
    errors, missing, failures = {}, {}, {}
    for label, case in cases.items():
        with judged(label, missing, failures, setup.device):
            errors[label] = case(setup, label)
    return {**row, "errors": errors, "missing": missing, "failures": failures}


def _repeated(dim: int) -> Check:
    def check(setup: Setup, label: str) -> Row:
        rows = ROWS if setup.dry else {"prompt": 333, "subject": 700, "target": 1500}
        sampler = FeatureSampler(5, torch.bfloat16, setup.device, dim, heads=4 if setup.dry else 24)
        call = sampler.call(rows, weight=SHIFT, head_gain=HeadGain())
        control = call.control()
        first, stats = attention(call.q, call.k, call.v, control, backend=setup.backend, return_stats=True)
        times = 3 if setup.dry else 1000
        for i in range(times):
            again, other = attention(
                call.q, call.k, call.v, control, backend=setup.backend, return_stats=True
            )
            same = [torch.equal(a, b) for a, b in zip((first, *stats), (again, *other), strict=True)]
            if not all(same):
                names = [n for n, fine in zip(("out", "lse", "mass", "gain"), same, strict=True) if not fine]
                raise WrongResult(f"{label}: call {i + 1} differs in {', '.join(names)}")
        return {"repeats": times}

    return check


def _forward(feature: str, dtype: torch.dtype, dim: int) -> Check:
    def check(setup: Setup, label: str) -> Row:
        call = draw_feature(feature, dtype, dim, setup.device)
        exact, expected = exact_answer(call)
        eager, allowed = eager_output(call, dtype), _allowed(call)
        out = torch.full(exact.shape, float("nan"), dtype=dtype, device=setup.device)
        _run(call, setup, out=out)
        again, stats = _run(call, setup, return_stats=True)
        report: Row = {**compare(label, out, exact, eager, dtype, more=allowed)}
        compare(f"{label}, with statistics", again, exact, eager, dtype, more=allowed)
        rows = max(call.q.shape[1], 1)
        for name, got, value in (
            ("lse", stats.lse, expected.lse),
            ("mass", stats.mass / rows, expected.mass / rows),
            ("gain", stats.gain, expected.gain),
        ):
            report[name] = compare_statistic(f"{label}, {name}", got, value, STATISTICS[name])
        if not torch.equal(out, _run(call, setup)):
            raise WrongResult(f"{label}: two calls on the same inputs differ")
        return report

    return check


def _run(call: FeatureCall, setup: Setup, **more):
    """The call on the setup's backend."""
    return attention(**call.arguments, backend=setup.backend, **more)


def _allowed(call: FeatureCall) -> float:
    """What float32 sums may differ by in their order, on top of the eager form's error.

    With few elements or many segments the eager form's error is too small a sample: an ulp of the dtype more.
    """
    small_sample = call.q.numel() < 512 or len(call.keys) > 32
    eps = 8 * torch.finfo(torch.float32).eps + small_sample * torch.finfo(call.q.dtype).eps
    return largest_term_sum(call) * eps


def compare_statistic(name: str, got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest error of a statistic over max(1, |expected|); infinities must agree.

    Raises:
        WrongResult: they do not, or the error exceeds the tolerance.
    """
    infinite = torch.isinf(expected)
    if got.shape != expected.shape or not torch.equal(got.double()[infinite], expected.double()[infinite]):
        raise WrongResult(f"{name}: another shape, or not -inf where a row has no key")
    error = ((got.double() - expected) / expected.abs().clamp(min=1.0))[~infinite].abs()
    most = float(error.max()) if error.numel() else 0.0
    if not most <= tolerance:  # a NaN must fail
        raise WrongResult(f"{name}: error {most:.3g} against float64, allowed {tolerance:g}")
    return most


def _backward(feature: str, dtype: torch.dtype, dim: int) -> Check:
    def check(setup: Setup, label: str) -> Row:
        call = draw_feature(feature, dtype, dim, setup.device)
        shape = _run(call, setup).shape
        generator = torch.Generator(setup.device).manual_seed(7)
        grad = torch.randn(shape, generator=generator, device=setup.device).to(dtype)

        def gradients_of(wide: torch.dtype, forward: Callable[[FeatureCall], Tensor]) -> list[Tensor]:
            # Each form gets leaves in its own dtype, so that its gradients are rounded to that dtype.
            leaves = [
                [t.detach().to(wide).requires_grad_() for t in _listed(ts)] for ts in (call.q, call.k, call.v)
            ]
            q, k, v = (
                ts if isinstance(given, list) else ts[0]
                for ts, given in zip(leaves, (call.q, call.k, call.v))
            )
            flat = [t for ts in leaves for t in ts]
            return list(torch.autograd.grad(forward(replace(call, q=q, k=k, v=v)), flat, grad.to(wide)))

        exact = gradients_of(torch.float64, lambda c: exact_answer(c)[0])
        eager = gradients_of(torch.float32, lambda c: eager_output(c, dtype))
        got = gradients_of(dtype, lambda c: _run(c, setup))
        report: Row = {}
        names = [
            f"d{n}, tensor {i}"
            for n, t in zip("qkv", (call.q, call.k, call.v))
            for i in range(len(_listed(t)))
        ]
        for name, mine, truth, allowed in zip(names, got, exact, eager, strict=True):
            more = 4 * torch.finfo(dtype).eps * float(truth.abs().max())
            report[name] = compare(f"{label}, {name}", mine, truth, allowed.to(dtype), dtype, more=more)
        return report

    return check


def _listed(t: Tensor | list[Tensor]) -> list[Tensor]:
    return t if isinstance(t, list) else [t]

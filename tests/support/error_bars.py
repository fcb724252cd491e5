"""The error bar of attention on every backend: twice the error of eager code in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.bindings.backends import reference
from flashbrush.bindings.core.problem import Problem

from .calls import Call


def check_result(
    call: Call, out: Tensor, stats: fb.Stats | None = None, stats_tolerance: float | None = None
) -> None:
    """Compares with float64 of the reference: all finite, mean and largest error of out, statistics.

    Args:
        call: what was computed.
        out: (batch, rows, heads, dim). Its error may be twice that of `eager_output`, plus half an ulp of the
            largest truth, plus `rounding_slack`.
        stats: lse and mass are products of the inputs as they are, so they agree to float32 in every dtype.
        stats_tolerance: for a backend that rounds more in 16 bits, instead.
    """
    exact = call.to(torch.float64)
    truth, expected = exact.run("reference", return_stats=True)
    assert out.shape == truth.shape and out.dtype == call.q.dtype
    assert bool(torch.isfinite(out).all()), f"{int((~torch.isfinite(out)).sum())} outputs are not finite"
    if out.numel():
        slack = 0.5 * torch.finfo(call.q.dtype).eps * float(truth.abs().max())
        slack += rounding_slack(exact, call, out.numel())
        check_error("out", out, eager_output(call.problem()), truth, slack)
    if stats is None:
        return
    tolerance = 3e-5 if stats_tolerance is None or call.q.dtype == torch.float32 else stats_tolerance
    check_relative("lse", stats.lse, expected.lse, tolerance)
    rows = torch.tensor(max(call.q.shape[1], 1), dtype=torch.float64)
    check_relative("mass", stats.mass / rows, expected.mass / rows, tolerance)
    check_relative("gain", stats.gain, expected.gain, 50 * tolerance)


def check_error(name: str, got: Tensor, eager: Tensor, truth: Tensor, slack: float) -> None:
    """Fails unless the mean and the largest error are at most twice those of `eager`, plus `slack`."""
    error, allowed = (got.double() - truth).abs(), (eager.double() - truth).abs()
    for what, ours, eagers in (
        ("mean", error.mean(), allowed.mean()),
        ("largest", error.max(), allowed.max()),
    ):
        assert ours <= 2 * eagers + slack, (
            f"{name}: {what} error {ours:.3g}, eager {eagers:.3g}, slack {slack:.3g}"
        )


def check_relative(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fails unless abs(got - expected) <= tolerance * max(1, abs(expected)), infinities equal."""
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} for {tuple(expected.shape)}"
    infinite = torch.isinf(expected)
    assert torch.equal(got[infinite], expected[infinite]), f"{name}: -inf where a row has no key"
    error = ((got - expected).abs() / expected.abs().clamp(min=1.0))[~infinite]
    assert error.numel() == 0 or float(error.max()) <= tolerance, f"{name}: error {float(error.max()):.3g}"


def eager_output(problem: Problem) -> Tensor:
    """The reference with P and out rounded to q's dtype and float32 accumulation, as eager code computes."""
    return reference.forward(problem, round_map_to=problem.q.dtype).out


def rounding_slack(exact: Call, call: Call, size: int) -> float:
    """What eager code's error may fall short of by chance; exact: the call in float64, size: elements of out.

    In units of the sum of the terms' magnitudes: 8 float32 ulps, because both make the same few roundings in
    another order; and in 16 bits 2 ulps where there are few elements or keys, whose probabilities may happen
    to be exact.
    """
    if exact.q.numel() == 0:
        return 0.0
    v = [t.abs() for t in exact.v] if isinstance(exact.v, list) else exact.v.abs()
    magnitudes = Call(exact.q, exact.k, v, exact.control, exact.kwargs)
    magnitude = float(magnitudes.run("reference").abs().max())
    if any(c is not None for c in call.problem().contrast):
        magnitude *= 4  # beta * p and (beta - 1) / Nk nearly cancel
    few = size < 512 or call.problem().keys < 32
    return magnitude * (
        8 * torch.finfo(torch.float32).eps + (2 * torch.finfo(call.q.dtype).eps if few else 0)
    )

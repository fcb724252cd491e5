"""Forward and backward of plain attention, ours beside torch SDPA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bindings import attention, backends
from ..cases.float64_check import WrongResult
from ..cases.inputs import Case, Sampler, draw_case
from ..cases.shapes import Shape
from ..timing.host_clock import time_on_host
from ..timing.rounds import ratio
from ..timing.rows import Row, Settings, describe_shape, dtype_name, ratio_cells, seconds_cells

LONGEST = 2048  # tokens; longer shapes take minutes in torch's backward pass
# The attention, and whether it takes (batch, heads, tokens, dim).
CONTESTANTS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "sdpa": (F.scaled_dot_product_attention, True),
    "plain": (functools.partial(attention, backend="cpu"), False),
}


def measure(shape: Shape, dtype: torch.dtype, settings: Settings) -> Row:
    """One forward and backward pass of each contestant.

    Raises:
        WrongResult: a gradient is wrong at a small size of the shape.
    """
    reasons = backends()["cpu"]
    names = [name for name in CONTESTANTS if name != "plain" or not reasons]
    with torch.enable_grad():
        check(draw_case(shape.shrunk(), dtype, settings.seed), names)
        case = draw_case(shape, dtype, settings.seed)
        samples = time_on_host({n: step(n, case) for n in names}, settings.repeats, seed=settings.seed)
    return {
        "section": "forward and backward",
        "shape": describe_shape(shape),
        "dtype": dtype_name(dtype),
        "seconds": seconds_cells(samples),
        "ratios": ratio_cells({"sdpa/plain": ratio(samples, "sdpa", "plain")} if "plain" in names else {}),
        "missing": {"plain": "; ".join(reasons)} if reasons else {},
    }


def step(name: str, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass; returns the gradients of q, k and v in the contestant's layout."""
    run, heads_first = CONTESTANTS[name]
    leaves = [
        t.detach().requires_grad_() for t in (case.heads_first() if heads_first else (case.q, case.k, case.v))
    ]
    grad = _output_gradient(case)
    grad = grad.transpose(1, 2).contiguous() if heads_first else grad
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)


def _output_gradient(case: Case) -> Tensor:
    return Sampler(1, case.dtype).normal(*case.q.shape)


def check(case: Case, names: Sequence[str]) -> None:
    """Every gradient element against float64: SDPA within 5 % of the largest, ours within twice SDPA's error.

    Raises:
        WrongResult: a gradient is off by more.
    """
    leaves = [t.double().requires_grad_() for t in (case.q, case.k, case.v)]
    out = attention(leaves[0], leaves[1], leaves[2], backend="reference")
    exact = torch.autograd.grad(out, leaves, _output_gradient(case).double())
    largest = [float(g.abs().max()) for g in exact]
    bars = [0.05 * most for most in largest]
    for name in names:
        grads = step(name, case)()
        grads = [g.transpose(1, 2) for g in grads] if CONTESTANTS[name][1] else list(grads)
        errors = [float((g.double() - e).abs().max()) for g, e in zip(grads, exact, strict=True)]
        for what, error, bar in zip("qkv", errors, bars, strict=True):
            if not error <= bar:  # a NaN must fail
                where = f"{case.shape.name}, {case.dtype}"
                raise WrongResult(
                    f"{name}: gradient of {what} is off by {error:.3g}, allowed {bar:.3g} ({where})"
                )
        if name == "sdpa":
            ulp = 4 * torch.finfo(case.dtype).eps
            bars = [2 * error + ulp * most for error, most in zip(errors, largest, strict=True)]

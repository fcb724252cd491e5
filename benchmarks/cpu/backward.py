"""Forward and backward of plain attention, ours against torch SDPA."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bindings import attention, backends
from ..cases.shapes import Shape
from ..cases.truth import WrongResult
from ..timing.paired import paired, ratio
from . import peers
from .forward import Row, Settings, describe, rounded, seconds

LONGEST = 2048  # tokens; beyond, torch's backward takes the patience without telling more
# The attention, and whether it takes (batch, heads, tokens, dim).
CONTESTANTS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "sdpa": (F.scaled_dot_product_attention, True),
    "plain": (functools.partial(attention, backend="cpu"), False),
}


def measure(shape: Shape, dtype: torch.dtype, settings: Settings) -> Row:
    """Raises truth.WrongResult where our gradients at a small size of the shape are wrong."""
    reasons = backends()["cpu"]
    names = [name for name in CONTESTANTS if name != "plain" or not reasons]
    with torch.enable_grad():
        check(peers.draw(shape.shrunk(), dtype, settings.seed), names)
        case = peers.draw(shape, dtype, settings.seed)
        samples = paired({name: step(name, case) for name in names}, settings.repeats, seed=settings.seed)
    return {
        "section": "forward and backward",
        "shape": describe(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds(samples),
        "ratios": rounded({"sdpa/plain": ratio(samples, "sdpa", "plain")} if "plain" in names else {}),
        "missing": {"plain": "; ".join(reasons)} if reasons else {},
    }


def step(name: str, case: peers.Case) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward; returns the gradients of q, k and v in the contestant's layout."""
    run, heads_first = CONTESTANTS[name]
    leaves = [
        t.detach().requires_grad_() for t in (case.heads_first() if heads_first else (case.q, case.k, case.v))
    ]
    grad = _output_gradient(case)
    grad = grad.transpose(1, 2).contiguous() if heads_first else grad
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)


def _output_gradient(case: peers.Case) -> Tensor:
    return torch.randn(case.q.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)


def check(case: peers.Case, names: list[str]) -> None:
    """Gradients against float64: SDPA's within 5 % of the largest, ours within twice SDPA's error."""
    leaves = [t.double().requires_grad_() for t in (case.q, case.k, case.v)]
    p = torch.softmax(torch.einsum("bmhd,bnhd->bhmn", leaves[0], leaves[1]) * case.shape.dim**-0.5, -1)
    exact = torch.autograd.grad(
        torch.einsum("bhmn,bnhd->bmhd", p, leaves[2]), leaves, _output_gradient(case).double()
    )
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

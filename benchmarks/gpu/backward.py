"""Forward and backward on a GPU: gradients of some rows and keys checked against float64, then timed in
turns.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ...bindings import attention
from ..cases.shapes import Shape
from ..cases.truth import Terms, WrongResult, chunks, head_gain, sample
from ..cpu.forward import Row, describe, rounded, seconds
from ..cpu.peers import Case, Missing, draw
from ..timing import paired as timing
from . import peers as gpu_peers
from .forward import rates
from .machine import Setup, judged
from .shapes import dry, vary
from .timing import interleaved, sets

PEERS = ("cudnn", "flash", "efficient", "flash_attn_2", "flash_attn_3", "flash_attn_4")
OURS = ("plain", "shift", "brush")
# Five products of tiles for two: S, dP, dV, dQ, dK.
FLOPS = 3.5
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(setup: Setup, shape: Shape) -> Row:
    """One row, as gpu_forward's: wrong gradients are in `failures`, and have no time."""
    shape, device, dtype = dry(shape) if setup.dry else shape, setup.device, torch.bfloat16
    inputs = 2 * shape.batch * shape.heads * shape.dim * (shape.n_rows + 2 * shape.n_keys)
    cases = [draw(shape, dtype, seed, device) for seed in range(sets(device, inputs))]
    calls: dict[str, list[Callable[[], tuple[Tensor, ...]]]] = {}
    errors, missing, failures, bars = {}, {}, {}, None
    exact: dict[str, Gradients] = {}
    with torch.enable_grad():
        for label in (*PEERS, *OURS):
            variant = label if label in OURS else "plain"
            varied = [vary(case, variant) for case in cases]
            with judged(label, missing, failures, device, ours=label in OURS):
                steps = [_step(label, case, setup) for case in varied]
                grads = steps[0]()
                if variant not in exact:
                    exact[variant] = Gradients(varied[0])
                where = f"{label} at {shape.name}"
                errors[label] = exact[variant].check(where, grads, bars if label in OURS else None)
                calls[label] = list(steps)
                if label in PEERS and bars is None:
                    bars = {what: cell["max_error"] / cell["largest"] for what, cell in errors[label].items()}
                del grads
        samples = interleaved(calls, device, setup.seconds(1.5)) if calls else {}
    vendors = [n for n in PEERS if n in samples]
    found = {f"{a}/{b}": timing.ratio(samples, a, b) for a in OURS for b in vendors if a in samples}
    found |= {
        f"{a}/plain": timing.ratio(samples, a, "plain") for a in OURS[1:] if {a, "plain"} <= samples.keys()
    }
    if vendors:
        fastest = min(vendors, key=lambda n: timing.spread(samples[n]).median)
        found |= {f"{a}/vendor": timing.ratio(samples, a, fastest) for a in OURS if a in samples}
    return {
        "section": "forward and backward",
        "shape": describe(shape),
        "dtype": "bfloat16",
        "seconds": seconds(samples),
        "tflops": rates(samples, dict.fromkeys(samples, FLOPS * shape.flops)),
        "ratios": rounded(found),
        "errors": errors,
        "missing": missing,
        "failures": failures,
    }


def _step(label: str, case: Case, setup: Setup) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward; the gradients of q, k and v, (batch, tokens, heads, dim)."""
    grad = output_gradient(case)
    if label in OURS:
        control = None if label == "plain" else case.control
        attend: Attend = functools.partial(attention, control=control, backend=setup.backend)  # type: ignore[call-arg]
        leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
        return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)
    if label in gpu_peers.FORCED:
        if case.q.device.type != "cuda" and label != "flash":
            raise Missing(f"torch has no {label} kernel on the CPU")
        leaves = [t.detach().requires_grad_() for t in case.heads_first()]
        grad = grad.transpose(1, 2).contiguous()

        def step() -> tuple[Tensor, ...]:
            out = gpu_peers.forced(gpu_peers.FORCED[label], *leaves)
            return tuple(t.transpose(1, 2) for t in torch.autograd.grad(out, leaves, grad))

        return step
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    leafed = Case(case.shape, case.dtype, leaves[0], leaves[1], leaves[2], case.control)
    call, _ = gpu_peers.VENDORS[label].prepare(leafed)
    return lambda: torch.autograd.grad(call(), leaves, grad)


def output_gradient(case: Case) -> Tensor:
    generator = torch.Generator(case.q.device).manual_seed(1)
    return torch.randn(case.q.shape, generator=generator, device=case.q.device).to(case.dtype)


class Gradients:
    """dq of some rows, dk and dv of some keys, in float64, from the formulas; the map goes by chunks of rows.

    With o = gain * sum_j w_ij p_ij v_j: dP_ij = gain * w_ij * (dO_i . v_j), delta_i = sum_j p_ij dP_ij,
    dS = p * (dP - delta); a derived gain counts as a constant.
    """

    def __init__(self, case: Case) -> None:
        shape, device = case.shape, case.q.device
        picks = torch.tensor([row for _, row in sample(shape.rows)], device=device)
        self.rows = self.keys = picks
        gain = torch.ones(shape.batch, shape.heads, dtype=torch.float64, device=device)
        if shape.head_gain is not None:
            gain = head_gain(shape, case.q, case.k)
        grad, scale = output_gradient(case), shape.dim**-0.5
        lengths = torch.tensor(list(shape.rows.values()), device=device)
        segment = torch.repeat_interleave(torch.arange(len(shape.rows), device=device), lengths)  # (rows,)
        table = (
            Terms(shape, list(shape.rows), device).weight if shape.weight else None
        )  # (row segments, keys)
        size = (shape.batch, len(picks), shape.heads, shape.dim)
        self.dq, self.dk, self.dv = (torch.zeros(size, dtype=torch.float64, device=device) for _ in "qkv")
        for b, h in itertools.product(range(shape.batch), range(shape.heads)):
            q, k, v, do = (t[b, :, h].double() for t in (case.q, case.k, case.v, grad))
            for part in chunks(slice(0, shape.n_rows), shape.n_keys):
                weight = None if table is None else table[segment[part]]
                p = torch.softmax(q[part] @ k.T * scale, -1)
                wide = gain[b, h] * do[part] @ v.T
                wide = wide if weight is None else wide * weight
                ds = p * (wide - (p * wide).sum(-1, keepdim=True))
                inside = ((picks >= part.start) & (picks < part.stop)).nonzero().flatten()
                self.dq[b, inside, h] = scale * ds[picks[inside] - part.start] @ k
                self.dk[b, :, h] += scale * ds[:, picks].T @ q[part]
                p = p if weight is None else p * weight
                self.dv[b, :, h] += (gain[b, h] * p[:, picks]).T @ do[part]
        self.dtype = case.dtype

    def check(
        self, name: str, grads: tuple[Tensor, ...], bars: dict[str, float] | None
    ) -> dict[str, dict[str, float]]:
        """Max errors; bars: a vendor's largest error over the largest gradient, of which twice is allowed,
        else 5 %.

        Raises:
            WrongResult: a gradient is not finite, or off by more.
        """
        report: dict[str, dict[str, float]] = {}
        for what, grad, exact in zip("qkv", grads, (self.dq, self.dk, self.dv), strict=True):
            if not bool(torch.isfinite(grad).all()):
                raise WrongResult(f"{name}: the gradient of {what} has values that are not finite")
            largest = float(exact.abs().max())
            error = float((grad[:, self.rows].double() - exact).abs().max())
            bar = 0.05 if bars is None else 2 * bars[what] + 4 * torch.finfo(self.dtype).eps
            if not error <= bar * largest:  # a NaN must fail
                raise WrongResult(
                    f"{name}: the gradient of {what} is off by {error:.3g}, allowed {bar * largest:.3g}"
                )
            report[what] = {"max_error": error, "largest": largest}
        return report

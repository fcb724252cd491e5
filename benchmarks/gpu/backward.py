"""Forward and backward on a GPU: gradients of some rows and keys are checked, then all are timed in turns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...bindings import attention
from ..cases.contestants import Missing
from ..cases.float64_check import ExpectedGradients
from ..cases.inputs import Case, Sampler, draw_case
from ..cases.shapes import Shape
from ..timing.device_clock import input_sets, time_on_device
from ..timing.rounds import ratio, spread
from ..timing.rows import Row, describe_shape, ratio_cells, seconds_cells
from . import contestants
from .controls import case_with_control
from .forward import tflops
from .setup import Setup, judged
from .shapes import dry

VENDORS = ("cudnn", "flash", "efficient", "flash_attn_2", "flash_attn_3", "flash_attn_4")
OURS = ("plain", "shift", "brush")
FLOPS = 3.5  # times the forward pass's: five more matrix products, S, dP, dV, dQ and dK, for its two


def measure(setup: Setup, shape: Shape) -> Row:
    """One row of the results, as forward.measure's; a contestant with wrong gradients is not timed."""
    shape, device, dtype = dry(shape) if setup.dry else shape, setup.device, torch.bfloat16
    inputs = 2 * shape.batch * shape.heads * shape.dim * (shape.n_rows + 2 * shape.n_keys)
    cases = [draw_case(shape, dtype, seed, device) for seed in range(input_sets(device, inputs))]
    calls: dict[str, list[Callable[[], tuple[Tensor, ...]]]] = {}
    errors, missing, failures, bars = {}, {}, {}, None
    expected: dict[str, ExpectedGradients] = {}
    with torch.enable_grad():
        for label in (*VENDORS, *OURS):
            control = label if label in OURS else "plain"
            controlled = [case_with_control(case, control) for case in cases]
            with judged(label, missing, failures, device, ours=label in OURS):
                steps = [_step(label, case, setup) for case in controlled]
                grads = steps[0]()
                if control not in expected:
                    expected[control] = ExpectedGradients(controlled[0], output_gradient(controlled[0]))
                where = f"{label} at {shape.name}"
                errors[label] = expected[control].check(where, grads, bars if label in OURS else None)
                calls[label] = list(steps)
                if label in VENDORS and bars is None:
                    bars = {what: cell["max_error"] / cell["largest"] for what, cell in errors[label].items()}
                del grads
        samples = time_on_device(calls, device, setup.seconds(1.5)) if calls else {}
    vendors = [n for n in VENDORS if n in samples]
    found = {f"{a}/{b}": ratio(samples, a, b) for a in OURS for b in vendors if a in samples}
    found |= {f"{a}/plain": ratio(samples, a, "plain") for a in OURS[1:] if {a, "plain"} <= samples.keys()}
    if vendors:
        fastest = min(vendors, key=lambda n: spread(samples[n]).median)
        found |= {f"{a}/vendor": ratio(samples, a, fastest) for a in OURS if a in samples}
    return {
        "section": "forward and backward",
        "shape": describe_shape(shape),
        "dtype": "bfloat16",
        "seconds": seconds_cells(samples),
        "tflops": tflops(samples, dict.fromkeys(samples, FLOPS * shape.flops)),
        "ratios": ratio_cells(found),
        "errors": errors,
        "missing": missing,
        "failures": failures,
    }


def _step(label: str, case: Case, setup: Setup) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass; returns the gradients of q, k and v, (batch, tokens, heads, dim)."""
    grad = output_gradient(case)
    if label in OURS:
        control = None if label == "plain" else case.control
        attend: Any = functools.partial(attention, control=control, backend=setup.backend)
        leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
        return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)
    if label in contestants.FORCED:
        if case.q.device.type != "cuda" and label != "flash":
            raise Missing(f"torch has no {label} kernel on the CPU")
        leaves = [t.detach().requires_grad_() for t in case.heads_first()]
        grad = grad.transpose(1, 2).contiguous()

        def step() -> tuple[Tensor, ...]:
            out = contestants.forced(contestants.FORCED[label], *leaves)
            return tuple(t.transpose(1, 2) for t in torch.autograd.grad(out, leaves, grad))

        return step
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    leafed = Case(case.shape, case.dtype, leaves[0], leaves[1], leaves[2], case.control)
    call, _ = contestants.VENDORS[label].prepare(leafed)
    return lambda: torch.autograd.grad(call(), leaves, grad)


def output_gradient(case: Case) -> Tensor:
    return Sampler(1, case.dtype, case.q.device).normal(*case.q.shape)

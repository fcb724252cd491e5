"""What the GPU reaches at most: copy bandwidth and the rate of a matrix product."""

from __future__ import annotations

import functools

import torch

from ..timing.device_clock import time_on_device
from ..timing.rounds import spread
from ..timing.rows import Row, seconds_cells
from .machine import clocks
from .setup import Setup


def measure(setup: Setup) -> Row:
    """Copy bandwidth (bytes read plus written) and the rate of a bf16 matrix product, on random data."""
    device, dry = setup.device, setup.dry
    count, side = (1 << 16, 128) if dry else (1 << 30, 8192)
    source = torch.randn(count, device=device).bfloat16()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    calls = {
        "copy": [functools.partial(target.copy_, source)],
        "gemm": [functools.partial(torch.mm, a, b, out=product)],
    }
    samples = time_on_device(calls, device, setup.seconds(1.0))
    expected = a[:8].double() @ b.double()
    if (
        not torch.equal(target, source)
        or not float((product[:8].double() - expected).norm() / expected.norm()) < 1e-2
    ):
        raise RuntimeError("the copy or the matrix product is wrong")
    medians = {name: spread(s).median for name, s in samples.items()}
    return {
        "section": "ceilings",
        "seconds": seconds_cells(samples),
        "copy_tb_per_s": round(2 * source.numel() * 2 / medians["copy"] / 1e12, 3),
        "gemm_side": side,
        "gemm_tflops": round(2 * side**3 / medians["gemm"] / 1e12, 1),
        "nvidia_smi_after": clocks(device),
    }

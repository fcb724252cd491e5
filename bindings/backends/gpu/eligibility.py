"""Which tensors and problems the Triton kernels take. The cuda backend uses some of them, so its limits are
these too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.problem import Problem
from .device import interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TENSORS = 32  # key tensors of a list
MOST_MASS_SEGMENTS = 128
MOST_STRIDE = 2**31 // 256  # elements from a token to the next: a tile's rows are addressed in 32 bits


def tensor_reasons(t: Tensor) -> list[str]:
    """The reasons, in words, why no Triton kernel takes such a tensor where it is; empty: one does."""
    reasons = []
    if t.device.type != "cuda" and not interpreted():
        reasons.append(f"no Triton kernels for {t.device.type} tensors")
    if t.device.type == "cuda" and interpreted():
        reasons.append("Triton runs in its interpreter")
    if t.dtype not in DTYPES:
        reasons.append(f"{t.dtype} is not among float32, bfloat16 and float16")
    return reasons


def attention_reasons(p: Problem) -> list[str]:
    """The reasons, in words, why the attention kernels do not take a problem; empty: they do."""
    reasons = tensor_reasons(p.q)
    if len(p.k) > MOST_TENSORS:
        reasons.append(f"{len(p.k)} key tensors are more than {MOST_TENSORS}")
    if p.need_mass and len(p.key_lengths) > MOST_MASS_SEGMENTS:
        reasons.append(f"the mass of {len(p.key_lengths)} key segments, more than {MOST_MASS_SEGMENTS}")
    tensors = (p.q, *p.k, *p.v) if p.out is None else (p.q, *p.k, *p.v, p.out)
    if (widest := max(t.stride(1) if t.shape[1] > 1 else 0 for t in tensors)) >= MOST_STRIDE:
        reasons.append(f"tokens that lie {widest} elements apart, {MOST_STRIDE} or more")
    return reasons


def emulated(t: Tensor) -> bool:
    """Whether the interpreter has to compute bfloat16 in float32: its own arithmetic is wrong there."""
    return t.dtype == torch.bfloat16 and interpreted()

"""qk_norm_rope through Triton: one read and one write of each element, forward; its gradient in two launches.

Verified in Triton's interpreter and compiled for sm_80 and sm_90; not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.norm_rope import NormRope
from ..gpu.device import interpreted, on_device
from ..gpu.eligibility import DTYPES, tensor_reasons

MOST_STREAMS = 16  # each has its own address arithmetic in the kernels
MOST_DIM = 256


def why_not(xs: Sequence[Tensor]) -> list[str]:
    reasons = tensor_reasons(xs[0])
    if xs[0].shape[3] > MOST_DIM:
        reasons.append(f"the head dim {xs[0].shape[3]} is more than {MOST_DIM}")
    if len(xs) > MOST_STREAMS:
        reasons.append(f"{len(xs)} streams are more than {MOST_STREAMS}")
    return reasons


def forward(call: NormRope) -> Tensor:
    """Computed in float32 and rounded once."""
    from ....kernels.qk_norm_rope import qk_norm_rope

    xs, weights, offsets, cos, sin, eps, half, permutation = call

    out = xs[0].new_empty(xs[0].shape[0], sum(x.shape[1] for x in xs), *xs[0].shape[2:])
    if out.numel():
        shifts = [
            None if t is None else _floating(t, x).expand(x.shape) for t, x in zip(offsets, xs, strict=True)
        ]
        norms = [None if w is None else _floating(w, x) for w, x in zip(weights, xs, strict=True)]
        with on_device(out):
            qk_norm_rope(
                _rows(xs),
                norms,
                shifts,
                cos,
                sin,
                _by_item(permutation, out),
                out,
                eps,
                half,
                interpreted(),
            )
    return out


def backward(
    dout: Tensor,
    call: NormRope,
    need_dweight: bool = True,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """dout as the output -> dx, dweight and doffset of each stream; None for a weight or an offset that is
    not there.

    offsets: those whose gradient is wanted. need_dweight: False leaves every dweight None.
    """
    from ....kernels.qk_norm_rope import qk_norm_rope_backward

    xs, weights, offsets, cos, sin, eps, half, permutation = call

    norms = [None if w is None else _floating(w, x) for w, x in zip(weights, xs, strict=True)]
    make = torch.empty if dout.numel() else torch.zeros
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    dweights = [
        None if w is None or not need_dweight else make(w.shape, dtype=w.dtype, device=w.device)
        for w in norms
    ]
    shifts = [None if t is None else _empty_shift(t, x) for t, x in zip(offsets, xs, strict=True)]
    if dout.numel():
        with on_device(dout):
            qk_norm_rope_backward(
                _rows([dout])[0],
                _rows(xs),
                norms,
                cos,
                sin,
                _by_item(permutation, dout),
                dxs,
                dweights,
                shifts,
                eps,
                half,
                interpreted(),
            )
    doffsets = [
        None if t is None or d is None else d.sum_to_size(t.shape).to(t.dtype)
        for t, d in zip(offsets, shifts, strict=True)
    ]
    return dxs, dweights, doffsets


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]


def _floating(t: Tensor, x: Tensor) -> Tensor:
    return t if t.dtype in (*DTYPES, torch.float64) else t.to(x.dtype)


def _empty_shift(offset: Tensor, x: Tensor) -> Tensor:
    """For the gradient of an offset as if it had x's shape: in float32 where it is still to be summed."""
    dtype = offset.dtype if offset.shape == x.shape else torch.float32
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _by_item(permutation: Tensor | None, out: Tensor) -> Tensor | None:
    return None if permutation is None else permutation.expand(out.shape[:2])

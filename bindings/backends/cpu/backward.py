"""The gradient of attention on the CPU: one fused C++ kernel, csrc/cpu/schedule/backward.cpp."""

from __future__ import annotations

from ctypes import Structure, c_void_p

import torch
from torch import Tensor

from ...core.problem import Problem
from .library import run
from .structures import Attention, Tensor4, describe, describe_call, describe_list


class _Backward(Structure):
    _fields_ = (
        ("call", Attention),
        ("dout", Tensor4),
        ("dq", Tensor4),
        ("dk", c_void_p),
        ("dv", c_void_p),
        ("gains", c_void_p),
    )


def backward(
    problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, gain: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dout and out (B, M, H, D), lse (B, H, M, G), gain (B, H, R) -> dq, and dk and dv, one for each of k and
    v.

    The sums over rows are in float32. Each (item, key head) belongs to one thread, so that they have one
    order.
    """
    p = problem
    dout = dout.to(p.q.dtype).contiguous()
    lse, gain = lse.contiguous(), gain.to(torch.float32).contiguous()
    keep: list = [dout, out, gain]
    dq = torch.empty(p.batch, p.rows, p.heads, p.dim, dtype=p.q.dtype)
    dk, dv = (
        [torch.zeros(p.batch, *t.shape[1:], dtype=torch.float32) for t in tensors] for tensors in (p.k, p.v)
    )
    call = _Backward(
        call=describe_call(p, out, lse, keep),
        dout=describe(dout, False),
        dq=describe(dq, False),
        dk=describe_list(dk, False, keep),
        dv=describe_list(dv, False, keep),
        gains=gain.data_ptr(),
    )
    run("backward", call)

    def collect(grads: list[Tensor], tensors: tuple[Tensor, ...], source: Tensor | None) -> list[Tensor]:
        sources = [None] * len(grads) if source is None else source
        return [_collect(g, t, index) for g, t, index in zip(grads, tensors, sources, strict=True)]

    return _collect(dq, p.q, p.source_q), collect(dk, p.k, p.source_k), collect(dv, p.v, p.source_v)


def _collect(grad: Tensor, t: Tensor, source: Tensor | None) -> Tensor:
    """The gradient of every output item (B, ...), summed onto the items of t that they read."""
    if source is not None:
        grad = torch.zeros(t.shape, dtype=torch.float32).index_add_(0, source, grad.float())
    elif t.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.to(t.dtype)

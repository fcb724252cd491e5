"""qk_norm_rope on the CPU, through the shared library built from csrc/cpu: one read and one write of each
element.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import attention as cpu

PARTS = 64  # the tokens are cut into so many parts, each with sums of its own; not a matter of threads


class _Stream(Structure):
    _fields_ = (
        ("x", cpu.Tensor4),
        ("offset", cpu.Tensor4),
        ("weight", c_void_p),
        ("tokens", c_int64),
        ("normalise", c_int32),
    )


class _NormRope(Structure):
    _fields_ = (
        ("abi", c_int32),
        ("dtype", c_int32),
        *((size, c_int64) for size in ("B", "T", "H", "D", "streams")),
        ("stream", POINTER(_Stream)),
        ("out", cpu.Tensor4),
        *((array, c_void_p) for array in ("cos", "sin", "permutation")),
        ("permutation_stride", c_int64),
        ("eps", c_float),
        ("half", c_int32),
        ("threads", c_int32),
    )


class _NormRopeBackward(Structure):
    _fields_ = (("forward", _NormRope), ("dx", c_void_p), ("dweight", c_void_p), ("parts", c_int64))


def usable(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in cpu.DTYPES and x.shape[3] <= 256 and not cpu.available()


def forward(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    offsets: Sequence[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half: bool,
    permutation: Tensor | None,
) -> Tensor:
    """As qk_norm_rope, whose arguments these are; what lies between is kept in float32 and rounded once."""
    out = xs[0].new_empty(xs[0].shape[0], sum(x.shape[1] for x in xs), *xs[0].shape[2:])
    if out.numel():
        keep: list = []
        cpu.run("norm_rope", _describe(out, xs, weights, offsets, cos, sin, eps, half, permutation, keep))
    return out


def backward(
    dout: Tensor,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half: bool,
    permutation: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """dout as the output -> dx, and dweight (empty where a stream has no weight)"""
    keep: list = []
    dxs = [torch.empty(x.shape, dtype=x.dtype) for x in xs]
    sums = torch.zeros(len(xs), PARTS, xs[0].shape[3], dtype=torch.float32)
    if dout.numel():
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        plain = [None] * len(xs)
        call = _NormRopeBackward(
            forward=_describe(dout, xs, weights, plain, cos, sin, eps, half, permutation, keep),
            dx=cpu.describe_list(dxs, False, keep),
            dweight=sums.data_ptr(),
            parts=PARTS,
        )
        cpu.run("norm_rope_backward", call)
    dweights = [torch.empty(0) if w is None else sums[i].sum(0).to(w.dtype) for i, w in enumerate(weights)]
    return dxs, dweights


def _describe(
    out: Tensor,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    offsets: Sequence[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half: bool,
    permutation: Tensor | None,
    keep: list,
) -> _NormRope:
    def rows(t: Tensor) -> Tensor:
        return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()

    def pointer(t: Tensor | None, dtype: torch.dtype) -> int | None:
        if t is None:
            return None
        keep.append((t if t.dtype is dtype else t.to(dtype)).contiguous())
        return keep[-1].data_ptr()

    def describe(t: Tensor | None, like: Tensor) -> cpu.Tensor4:
        if t is None:
            return cpu.Tensor4(None, 0, 0, 0)
        t = (t if t.dtype is like.dtype else t.to(like.dtype)).expand(like.shape)
        keep.append(rows(t))
        return cpu.describe(keep[-1], False)

    xs = [rows(x) for x in xs]
    keep.extend(xs)
    streams = [
        _Stream(
            cpu.describe(x, False),
            describe(offset, x),
            pointer(weight, torch.float32),
            x.shape[1],
            weight is not None,
        )
        for x, weight, offset in zip(xs, weights, offsets, strict=True)
    ]
    B, T, H, D = out.shape
    return _NormRope(
        abi=cpu.ABI,
        dtype=cpu.DTYPES[out.dtype],
        B=B,
        T=T,
        H=H,
        D=D,
        streams=len(xs),
        stream=(_Stream * len(xs))(*streams),
        out=cpu.describe(out, False),
        cos=pointer(cos, torch.float32),
        sin=pointer(sin, torch.float32),
        permutation=pointer(permutation, torch.int64),
        permutation_stride=T if permutation is not None and permutation.dim() == 2 else 0,
        eps=eps,
        half=half,
        threads=torch.get_num_threads(),
    )

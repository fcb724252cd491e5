"""qk_norm_rope and its gradient on the CPU: one read and one write of each element,
csrc/cpu/schedule/norm_rope.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ...core.norm_rope import NormRope, sum_to
from .library import ABI, DTYPES, run
from .structures import Tensor4, describe, describe_list

MAX_DIM = 256
PARTS = 64  # the tokens are cut into this many parts, each with its own sums, whatever the number of threads


class _Stream(Structure):
    _fields_ = (
        ("x", Tensor4),
        ("offset", Tensor4),
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
        ("out", Tensor4),
        *((array, c_void_p) for array in ("cos", "sin", "permutation")),
        ("permutation_stride", c_int64),
        ("eps", c_float),
        ("half", c_int32),
        ("threads", c_int32),
    )


class _NormRopeBackward(Structure):
    _fields_ = (("forward", _NormRope), ("dx", c_void_p), ("dweight", c_void_p), ("parts", c_int64))


def why_not(xs: Sequence[Tensor]) -> list[str]:
    x, reasons = xs[0], []
    if x.device.type != "cpu":
        reasons.append(f"the tensors are on {x.device.type}")
    if x.dtype not in DTYPES:
        reasons.append(f"{x.dtype} is not float32, bfloat16 or float16")
    if x.shape[3] > MAX_DIM:
        reasons.append(f"the head dim {x.shape[3]} is more than {MAX_DIM}")
    return reasons


def forward(call: NormRope) -> Tensor:
    """Computed in float32 and rounded once."""
    xs = call.xs
    out = xs[0].new_empty(xs[0].shape[0], sum(x.shape[1] for x in xs), *xs[0].shape[2:])
    if out.numel():
        keep: list = []
        run("norm_rope", _describe(out, call, keep))
    return out


def backward(dout: Tensor, call: NormRope, need_dweight: bool) -> tuple[list, list, list]:
    """dout as the output -> dx, dweight and doffset of each stream.

    call.offsets: those whose gradient is wanted. Where there is none, or need_dweight is False, it gives
        None.
    """
    dxs, dweights = _gradients(dout, call)
    if not need_dweight:
        dweights = [None] * len(dxs)
    if all(t is None for t in call.offsets):
        return dxs, dweights, list(call.offsets)
    # Without a norm, the gradient of x is that of an offset of x's shape.
    shifts, _ = _gradients(dout, call._replace(weights=[None] * len(dxs)))
    doffsets = [None if t is None else sum_to(t, d) for t, d in zip(call.offsets, shifts, strict=True)]
    return dxs, dweights, doffsets


def _gradients(dout: Tensor, call: NormRope) -> tuple[list[Tensor], list[Tensor | None]]:
    """dx, and dweight, which is None where a stream has no weight."""
    xs, keep = call.xs, []
    dxs = [torch.empty(x.shape, dtype=x.dtype) for x in xs]
    sums = torch.zeros(len(xs), PARTS, xs[0].shape[3], dtype=torch.float32)
    if dout.numel():
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        structure = _NormRopeBackward(
            forward=_describe(dout, call._replace(offsets=[None] * len(xs)), keep),
            dx=describe_list(dxs, False, keep),
            dweight=sums.data_ptr(),
            parts=PARTS,
        )
        run("norm_rope_backward", structure)
    dweights = [None if w is None else sums[i].sum(0).to(w.dtype) for i, w in enumerate(call.weights)]
    return dxs, dweights


def _describe(out: Tensor, call: NormRope, keep: list) -> _NormRope:
    """The C structure; `keep` takes what it points to, and must live as long."""
    xs, weights, offsets, cos, sin, eps, half, permutation = call

    def rows(t: Tensor) -> Tensor:
        return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()

    def pointer(t: Tensor | None, dtype: torch.dtype) -> int | None:
        if t is None:
            return None
        keep.append((t if t.dtype is dtype else t.to(dtype)).contiguous())
        return keep[-1].data_ptr()

    def describe_like(t: Tensor | None, like: Tensor) -> Tensor4:
        if t is None:
            return Tensor4(None, 0, 0, 0)
        t = (t if t.dtype is like.dtype else t.to(like.dtype)).expand(like.shape)
        keep.append(rows(t))
        return describe(keep[-1], False)

    xs = [rows(x) for x in xs]
    keep.extend(xs)
    streams = [
        _Stream(
            describe(x, False),
            describe_like(offset, x),
            pointer(weight, torch.float32),
            x.shape[1],
            weight is not None,
        )
        for x, weight, offset in zip(xs, weights, offsets, strict=True)
    ]
    B, T, H, D = out.shape
    return _NormRope(
        abi=ABI,
        dtype=DTYPES[out.dtype],
        B=B,
        T=T,
        H=H,
        D=D,
        streams=len(xs),
        stream=(_Stream * len(xs))(*streams),
        out=describe(out, False),
        cos=pointer(cos, torch.float32),
        sin=pointer(sin, torch.float32),
        permutation=pointer(permutation, torch.int64),
        permutation_stride=T if permutation is not None and permutation.dim() == 2 else 0,
        eps=eps,
        half=half,
        threads=torch.get_num_threads(),
    )

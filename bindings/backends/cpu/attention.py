"""Fused attention on the CPU, through the shared library built from csrc/cpu.

The library knows nothing of torch; it is called through its C interface and runs on torch's own threads.
FLASHBRUSH_CPU_ISA=amx|avx512bf16|avx512|avx2|portable forces one of the instruction sets that are built in;
without it the best of them runs, but never AMX, whose logic is verified by emulation and which has not yet
run on hardware.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ...core.control import NORMS, Contrast
from ...core.problem import Problem
from .. import Result
from ..shared_library import open_library

name = "cpu"
ABI = 2
LIBRARY = Path(__file__).parents[1] / "libflashbrush_cpu.so"
BY_NAME_ONLY = ("amx",)  # of the instruction sets
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FAILURES = {
    1: "the instruction set is not available",
    2: "out of memory",
    3: "the shared library is of another version; build it again",
}


class Tensor4(Structure):
    _fields_ = (("data", c_void_p), ("stride_b", c_int64), ("stride_t", c_int64), ("stride_h", c_int64))


class _Table(Structure):
    _fields_ = (("data", c_void_p), ("stride_b", c_int64), ("stride_h", c_int64))


class Attention(Structure):
    _fields_ = (
        ("abi", c_int32),
        ("dtype", c_int32),
        *((size, c_int64) for size in ("B", "M", "H", "Hkv", "D", "R", "C", "G", "L")),
        ("q", Tensor4),
        ("out", Tensor4),
        *(
            (array, c_void_p)
            for array in ("k", "v", "source_q", "source_k", "source_v", "row_lengths", "key_lengths", "valid")
        ),
        ("rows_by_item", c_int32),
        ("keys_by_item", c_int32),
        ("groups", c_void_p),
        ("contrast", c_void_p),
        *((table, _Table) for table in ("scale", "bias", "weight", "gain", "gates")),
        ("lse", c_void_p),
        ("mass", c_void_p),
        ("derived", c_int32),
        ("span", c_float),
        ("floor", c_float),
        *((flags, c_char_p) for flags in ("gain_rows", "gain_keys", "gain_apply")),
        ("gains", c_void_p),
        ("threads", c_int32),
    )


class _Backward(Structure):
    _fields_ = (
        ("call", Attention),
        ("dout", Tensor4),
        ("dq", Tensor4),
        ("dk", c_void_p),
        ("dv", c_void_p),
        ("gains", c_void_p),
    )


def available() -> list[str]:
    library, reason = _load()
    if library is None:
        return [reason]
    wanted = _wanted_isa()
    if wanted and wanted not in isas():
        return [
            f"FLASHBRUSH_CPU_ISA={wanted} is not one of {', '.join(isas())}, which are built in and run here"
        ]
    return []


def why_not(problem: Problem) -> list[str]:
    reasons = []
    if problem.q.device.type != "cpu":
        reasons.append(f"the tensors are on {problem.q.device.type}")
    if problem.q.dtype not in DTYPES:
        reasons.append(f"{problem.q.dtype} is not float32, bfloat16 or float16")
    if problem.mask is not None:
        reasons.append("a dense mask")
    return reasons


def isas() -> list[str]:
    """The instruction sets that are built in and run on this machine, best first, those that have to be named
    too.
    """
    library, _ = _load()
    names = []
    while library is not None and (isa := library.flashbrush_isa(len(names))):
        names.append(isa.decode())
    return names


def forward(problem: Problem) -> Result:
    """Any layout with a contiguous last dimension.

    Extra memory: packed K and V of two heads, with three or four threads of one head a thread, and scratch
        per thread.
    """
    p = problem
    R, C = len(p.row_lengths), len(p.key_lengths)
    out = torch.empty(p.batch, p.rows, p.heads, p.dim, dtype=p.q.dtype) if p.out is None else p.out
    lse = torch.empty(p.batch, p.heads, p.rows, p.n_groups, dtype=torch.float32) if p.need_stats else None
    mass = torch.empty(p.batch, p.heads, R, C, dtype=torch.float32) if p.need_mass else None
    gains = torch.empty(p.batch, p.heads, R, dtype=torch.float32) if p.need_mass else None
    keep: list = []
    call = describe_call(p, out, lse, keep)
    call.mass, call.gains = (None if t is None else t.data_ptr() for t in (mass, gains))
    if (rule := p.head_gain) is not None:
        call.derived, (call.span, call.floor) = NORMS.index(rule.norm), rule.values.tolist()
        call.gain_rows, call.gain_keys = _flags(rule.rows, R), _flags(rule.keys, C)
        call.gain_apply = _flags(rule.apply, R)
    run("attention", call)
    return Result(out, lse, mass, gains)


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


def describe_call(p: Problem, out: Tensor, lse: Tensor | None, keep: list) -> Attention:
    """The C structure; `keep` takes what it points to, and must live as long."""
    structure, held = _structure(
        p.q.dtype,
        p.batch,
        *p.q.shape[1:],
        p.kv_heads,
        len(p.k),
        p.row_lengths,
        p.key_lengths,
        p.groups,
        p.contrast,
        p.scale,
    )
    keep.append(held)
    call = Attention.from_buffer_copy(structure)
    call.q, call.out = describe(p.q, p.source_q is None), describe(out, True)
    call.k, call.v = (
        describe_list(p.k, p.source_k is None, keep),
        describe_list(p.v, p.source_v is None, keep),
    )
    call.threads = torch.get_num_threads()
    if lse is not None:
        keep.append(lse)
        call.lse = lse.data_ptr()

    def array(t: Tensor, dtype: torch.dtype) -> Tensor:
        keep.append((t if t.dtype is dtype else t.to(dtype)).contiguous())
        return keep[-1]

    for name, t in (
        ("scale", p.scales),
        ("bias", p.bias),
        ("weight", p.weight),
        ("gain", p.gain),
        ("gates", p.gates),
    ):
        if t is not None:  # (1|B, 1|H, ...), contiguous but for the first two dimensions
            t = array(t, torch.float32)
            setattr(call, name, _Table(t.data_ptr(), *(t.stride(i) if t.shape[i] > 1 else 0 for i in (0, 1))))
    for name, t in (("source_q", p.source_q), ("source_k", p.source_k), ("source_v", p.source_v)):
        if t is not None:
            setattr(call, name, array(t, torch.int64).data_ptr())
    if p.row_items is not None:
        call.row_lengths, call.rows_by_item = array(p.row_items, torch.int32).data_ptr(), True
    if p.key_items is not None:
        call.key_lengths, call.keys_by_item = array(p.key_items, torch.int32).data_ptr(), True
    if p.valid is not None:
        call.valid = array(p.valid.clamp(min=0), torch.int32).data_ptr()
    return call


@functools.lru_cache(1024)
def _structure(
    dtype: torch.dtype,
    batch: int,
    rows: int,
    heads: int,
    dim: int,
    kv_heads: int,
    tensors: int,
    row_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    groups: tuple[int, ...],
    contrast: tuple[Contrast | None, ...],
    scale: float,
) -> tuple[Attention, tuple]:
    """What calls of one shape have in common, to be copied, and what it points to. Filling it in anew takes
    as long as a short call."""
    numbers: list[float] = []
    for c in contrast:
        numbers += [0.0] * 4 if c is None else [1.0 + (c.clip is not None), c.beta, *(c.clip or (0.0, 0.0))]
    ints = [(c_int32 * len(values))(*values) for values in (row_lengths, key_lengths, groups)]
    held = (*ints, (c_float * len(numbers))(*numbers), c_float(scale))
    row_array, key_array, group_array, contrast_array, number = map(addressof, held)
    call = Attention(
        abi=ABI,
        dtype=DTYPES[dtype],
        B=batch,
        M=rows,
        H=heads,
        Hkv=kv_heads,
        D=dim,
        R=len(row_lengths),
        C=len(key_lengths),
        G=len(contrast),
        L=tensors,
        row_lengths=row_array,
        key_lengths=key_array,
        groups=group_array,
        contrast=contrast_array,
        scale=_Table(number, 0, 0),
        derived=-1,
    )
    return call, held


@functools.lru_cache(1024)
def _flags(chosen: tuple[int, ...], count: int) -> bytes:
    return bytes(i in chosen for i in range(count))


def describe(t: Tensor, broadcast: bool) -> Tensor4:
    return Tensor4(*_fields(t, broadcast))


def describe_list(tensors: Sequence[Tensor], broadcast: bool, keep: list) -> int:
    """The address of a Tensor4 for each; as in describe_call()."""
    keep.append((c_int64 * (4 * len(tensors)))(*(x for t in tensors for x in _fields(t, broadcast))))
    return addressof(keep[-1])


def _fields(t: Tensor, broadcast: bool) -> tuple[int, int, int, int]:
    """A Tensor4's."""
    batch, token, head, _ = t.stride()
    return t.data_ptr(), 0 if broadcast and t.shape[0] == 1 else batch, token, head


def run(function: str, call: Structure) -> None:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    code = getattr(library, f"flashbrush_{function}")(byref(call), _wanted_isa().encode(), _parallel())
    if code:
        raise RuntimeError(f"flashbrush: {function} on the cpu backend failed: {_FAILURES.get(code, code)}")


def _wanted_isa() -> str:
    return os.environ.get("FLASHBRUSH_CPU_ISA", "")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(library, reason why there is none)"""
    library, reason = open_library(LIBRARY)
    if library is None:
        return None, reason
    if library.flashbrush_abi() != ABI:
        return None, _FAILURES[3]
    library.flashbrush_isa.restype = c_char_p
    library.flashbrush_isa.argtypes = (c_int,)
    for function in ("attention", "backward", "column_mass", "norm_rope", "norm_rope_backward"):
        getattr(library, f"flashbrush_{function}").argtypes = (c_void_p, c_char_p, c_void_p)
    return library, ""


@functools.cache
def _parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch uses: its threads, spinning already,
    serve us too.

    None where torch is built otherwise; the library then starts threads of its own.
    """
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(torch_cpu)).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None

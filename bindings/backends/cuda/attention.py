"""Fused attention for Hopper GPUs in CUDA C++, through the shared library built from csrc/cuda.

Warp-specialised, with TMA and wgmma. The library knows nothing of torch. Triton kernels sum the masses and
apply a derived gain; the gradient is the triton backend's.

Verified in an emulation of the hardware's instructions and compiled for sm_90a; not yet run on hardware.
Therefore the
planner never chooses it: it runs only where backend="cuda" names it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ....kernels.attention.tiles import forward_tile
from ...core.problem import Problem
from ..gpu import statistics
from ..gpu.constants import blocks, constant, starts
from ..gpu.device import arch, multiprocessors, on_device, triton_reasons
from ..gpu.eligibility import attention_reasons
from ..interface import Result
from ..shared_library import open_library

ABI = 1
LIBRARY = Path(__file__).parents[1] / "libflashbrush_cuda.so"
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
MOST_DIM = 128  # and multiples of 8; 64 and 128 fill the tiles, others are filled up with zeros
MOST_SEGMENTS, MOST_GROUPS = 32, 8
PART = 64  # rows of a block's part, each with a partial mass of its own
ARCH = 90

_FAILURES = {
    -1: "the shared library is of another version; build it again",
    -2: "no kernel takes this call",
    -3: "the driver refuses the layout of a tensor",
}


class _Tensor(Structure):
    _fields_ = (
        ("data", c_void_p),
        *((size, c_int64) for size in ("items", "tokens", "stride_b", "stride_t", "stride_h")),
    )


class _Table(Structure):
    _fields_ = (("data", c_void_p), ("stride_b", c_int64), ("stride_h", c_int64))


class _Attention(Structure):
    _fields_ = (
        ("abi", c_int32),
        ("dtype", c_int32),
        *(
            (size, c_int32)
            for size in ("B", "M", "H", "Hkv", "D", "R", "C", "G", "L", "row_blocks", "multiprocessors")
        ),
        ("scale", c_float),
        ("q", _Tensor),
        ("out", _Tensor),
        ("k", POINTER(_Tensor)),
        ("v", POINTER(_Tensor)),
        *(
            (array, c_void_p)
            for array in ("source_q", "source_k", "source_v", "row_starts", "key_starts", "valid")
        ),
        ("rows_by_item", c_int32),
        ("keys_by_item", c_int32),
        ("groups", c_void_p),
        ("order", c_void_p),
        *((table, _Table) for table in ("scales", "bias", "weight", "gain", "gates")),
        *((array, c_void_p) for array in ("contrast", "value_sums", "lse", "partial_mass")),
    )


def available() -> list[str]:
    library, reason = _open(LIBRARY)
    if library is None:
        return [reason]
    if not torch.cuda.is_available():
        return ["no GPU is visible to torch"]
    return triton_reasons()


def why_not(problem: Problem) -> list[str]:
    p, reasons = problem, []
    if p.q.device.type == "cuda" and arch(p.q.device) != ARCH:
        reasons.append(f"the GPU's compute capability is {arch(p.q.device) / 10}, not 9.0")
    if p.q.dtype not in DTYPES:
        reasons.append(f"{p.q.dtype} is not bfloat16 or float16")
    if p.dim > MOST_DIM or p.dim % 8:
        reasons.append(f"the head dim {p.dim} is not a multiple of 8 up to {MOST_DIM}")
    if len(p.key_lengths) > MOST_SEGMENTS:
        reasons.append(f"{len(p.key_lengths)} key segments are more than {MOST_SEGMENTS}")
    if p.n_groups > MOST_GROUPS:
        reasons.append(f"{p.n_groups} softmax groups are more than {MOST_GROUPS}")
    if any(c is not None and c.clip is not None for c in p.contrast):
        reasons.append("a contrast with clip takes a second sweep")
    tensors = {"q": [p.q], "k": p.k, "v": p.v, "out": [] if p.out is None else [p.out]}
    for which, some in tensors.items():
        if not all(_is_mapped(t) for t in some):
            reasons.append(
                f"{which}: the copy engine needs addresses and strides that are multiples of 16 bytes"
            )
    return reasons or attention_reasons(p)


def forward(problem: Problem) -> Result:
    """Extra memory: one partial mass per 64 rows, if the mass is needed."""
    with on_device(problem.q):
        return _forward(problem)


def _forward(p: Problem) -> Result:
    device, B, H, C, G = p.q.device, p.batch, p.heads, len(p.key_lengths), p.n_groups
    out = torch.empty(B, p.rows, H, p.dim, dtype=p.q.dtype, device=device) if p.out is None else p.out
    lse = torch.empty(B, H, p.rows, G, dtype=torch.float32, device=device) if p.need_stats else None
    block = _library().flashbrush_gpu_block_rows(p.dim, G)
    row_blocks, parts = blocks(p.row_lengths, p.row_items, block), block // PART
    partial = (
        torch.empty(B, H, row_blocks * parts, C, dtype=torch.float32, device=device) if p.need_mass else None
    )
    row_starts = starts(p.row_lengths, p.row_items, device)
    key_starts = starts(p.key_lengths, p.key_items, device)
    kinds = [0.0 if c is None else 1.0 for c in p.contrast]
    contrast = sums = None
    if any(kinds):
        flat = [x for c in p.contrast for x in ((0.0,) * 4 if c is None else (1.0, c.beta, 0.0, 0.0))]
        contrast = constant(tuple(flat), torch.float32, device)
        block_n = forward_tile(arch(device), p.dim, p.q.element_size()).block_n
        sums = statistics.value_sums(p, block_n, key_starts)
    ragged = p.row_items is not None or p.key_items is not None
    order = None if ragged else _order(p.row_lengths, p.key_lengths, p.pair_ids, block, device)
    keep: list[Tensor] = []

    def pointer(t: Tensor | None, dtype: torch.dtype) -> int | None:
        if t is None:
            return None
        keep.append((t if t.dtype is dtype else t.to(dtype)).contiguous())
        return keep[-1].data_ptr()

    def table(t: Tensor | None) -> _Table:
        """(1|B, 1|H, ...)"""
        if t is None:
            return _Table(None, 0, 0)
        data = pointer(t, torch.float32)
        return _Table(data, *(keep[-1].stride(i) if t.shape[i] > 1 else 0 for i in (0, 1)))

    call = _Attention(
        abi=ABI,
        dtype=DTYPES[p.q.dtype],
        B=B,
        M=p.rows,
        H=H,
        Hkv=p.kv_heads,
        D=p.dim,
        R=len(p.row_lengths),
        C=C,
        G=G,
        L=len(p.k),
        row_blocks=row_blocks,
        multiprocessors=multiprocessors(device),
        scale=p.scale,
        q=_describe(p.q),
        out=_describe(out),
        k=_describe_all(p.k),
        v=_describe_all(p.v),
        source_q=pointer(p.source_q, torch.int64),
        source_k=pointer(p.source_k, torch.int64),
        source_v=pointer(p.source_v, torch.int64),
        row_starts=row_starts.data_ptr(),
        key_starts=key_starts.data_ptr(),
        valid=pointer(p.valid, torch.int32),
        rows_by_item=p.row_items is not None,
        keys_by_item=p.key_items is not None,
        groups=pointer(constant(p.groups, torch.int32, device), torch.int32),
        order=pointer(order, torch.int32),
        scales=table(p.scales),
        bias=table(p.bias),
        weight=table(p.weight),
        gain=table(None if p.head_gain is not None else p.gain),
        gates=table(p.gates),
        contrast=pointer(contrast, torch.float32),
        value_sums=pointer(sums, torch.float32),
        lse=pointer(lse, torch.float32),
        partial_mass=pointer(partial, torch.float32),
    )
    _run(call, device)
    mass = gain = None
    if partial is not None:
        mass, gain = statistics.mass_and_gain(p, out, partial, row_starts, block, parts)
    return Result(out, lse, mass, gain)


def _run(call: _Attention, device: torch.device) -> None:
    library = _library()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    if status := library.flashbrush_gpu_attention(byref(call), stream):
        text = library.flashbrush_gpu_error(status)
        raise RuntimeError(
            f"flashbrush: {text.decode() if text else _FAILURES.get(status, f'error {status}')}"
        )


@functools.cache
def _open(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """(library, the reason why there is none)"""
    library, reason = open_library(path, "cuda")
    if library is not None:
        library.flashbrush_gpu_attention.argtypes = (POINTER(_Attention), c_void_p)
        library.flashbrush_gpu_attention.restype = c_int
        library.flashbrush_gpu_block_rows.argtypes = (c_int, c_int)
        library.flashbrush_gpu_error.argtypes = (c_int,)
        library.flashbrush_gpu_error.restype = c_char_p
    return library, reason


@contextlib.contextmanager
def trial(library: Path) -> Iterator[None]:
    """All calls of this process use another build of the library, for benchmarks/gpu/variants.py."""
    global LIBRARY
    before, LIBRARY = LIBRARY, library
    try:
        yield
    finally:
        LIBRARY = before


def _library() -> ctypes.CDLL:
    library, reason = _open(LIBRARY)
    if library is None:
        raise RuntimeError(reason)
    return library


def _is_mapped(t: Tensor) -> bool:
    """Whether a tensor map can describe t (items, tokens, heads, dim); a broadcast of items is one item."""
    first = int(t.stride(0) == 0)
    strides = [t.stride(i) for i in range(first, 3) if t.shape[i] > 1]
    return t.numel() == 0 or (t.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides))


def _describe(t: Tensor) -> _Tensor:
    items = 1 if t.stride(0) == 0 else t.shape[0]
    # The stride of a dimension of one entry says nothing, and may be refused.
    strides = [t.stride(i) if size > 1 else t.shape[3] for i, size in enumerate((items, *t.shape[1:3]))]
    return _Tensor(t.data_ptr(), items, t.shape[1], *strides)


def _describe_all(tensors: tuple[Tensor, ...]):
    return (_Tensor * len(tensors))(*map(_describe, tensors))


@functools.lru_cache(1024)
def _order(
    row_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    pair_ids: tuple[int, ...],
    block: int,
    device: torch.device,
) -> Tensor | None:
    """The order of the row blocks: those that see the most keys first, so that the last to run are short.

    None if all see equally many.
    """
    C = len(key_lengths)
    seen = [zip(key_lengths, pair_ids[r * C : (r + 1) * C], strict=True) for r in range(len(row_lengths))]
    costs = [sum(length for length, kind in pairs if kind >= 0) for pairs in seen]
    if len(set(costs)) == 1:
        return None
    blocks = [
        cost for cost, length in zip(costs, row_lengths, strict=True) for _ in range(-(-length // block))
    ]
    return constant(tuple(sorted(range(len(blocks)), key=lambda i: -blocks[i])), torch.int32, device)

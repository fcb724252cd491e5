"""The C structures of csrc/cpu/attention.h, and how a problem fills them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import Structure, addressof, c_char_p, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ...core.control import Contrast
from ...core.problem import Problem
from .library import ABI, DTYPES


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
        if t is not None:  # (1|B, 1|H, ...), contiguous except in the first two dimensions
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
    """The fields that calls of one shape share, and the arrays that they point to.

    Cached, and copied for each call: filling it in takes 11 to 12 us (benchmarks/results/overheads.json).
    """
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


def describe(t: Tensor, broadcast: bool) -> Tensor4:
    return Tensor4(*_fields(t, broadcast))


def describe_list(tensors: Sequence[Tensor], broadcast: bool, keep: list) -> int:
    """The address of an array of Tensor4, one per tensor; `keep` as in describe_call()."""
    keep.append((c_int64 * (4 * len(tensors)))(*(x for t in tensors for x in _fields(t, broadcast))))
    return addressof(keep[-1])


def _fields(t: Tensor, broadcast: bool) -> tuple[int, int, int, int]:
    """The values of a Tensor4: address and strides of item, token and head."""
    batch, token, head, _ = t.stride()
    return t.data_ptr(), 0 if broadcast and t.shape[0] == 1 else batch, token, head

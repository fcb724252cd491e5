"""The kernels around an attention kernel: sums of values, mass, head gain, scaling of rows.

All of them reduce in a fixed order. Verified in Triton's interpreter and compiled for sm_80, sm_90 and
sm_120; not yet run on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import find_rows, load_tile, pick, rounded
from .arguments import KeyTensors, alignment, item_stride


@triton.jit(do_not_specialize=["stride_starts", "n_items", "n_kv_heads", "n_keys", "n_key_segments"])
def value_sums_kernel(
    values,  # KeyTensors
    p_sums,  # (B, Hkv, C, D) float32, written
    p_key_starts,  # (1|B, C + 1) int32, or None: one segment
    p_valid,  # (B, C) int32, or None
    stride_starts,  # of an item in p_key_starts
    n_items,
    n_kv_heads,
    n_keys,
    n_key_segments,
    KEY_TENSORS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One program per item, key head and key segment."""
    c = tl.program_id(0) % n_key_segments
    h = tl.program_id(0) // n_key_segments % n_kv_heads
    b = tl.program_id(0) // n_key_segments // n_kv_heads
    start = 0
    n = n_keys
    if p_key_starts is not None:
        start = tl.load(p_key_starts + b * stride_starts + c)
        n = tl.load(p_key_starts + b * stride_starts + c + 1) - start
    t = 0
    if KEY_TENSORS > 1:
        t = c
        start = 0
    if p_valid is not None:
        n = tl.minimum(n, tl.maximum(tl.load(p_valid + b * n_key_segments + c), 0))
    item = b
    if values.source is not None:
        item = tl.load(values.source + t * n_items + b)
    stride = pick(values.stride_n, t, KEY_TENSORS)
    p_v = pick(values.ps, t, KEY_TENSORS)
    p_v += tl.multiple_of(tl.cast(item, tl.int64) * pick(values.stride_b, t, KEY_TENSORS), ALIGN)
    p_v += tl.multiple_of(tl.cast(start, tl.int64) * stride, ALIGN)
    p_v += tl.multiple_of(tl.cast(h, tl.int64) * pick(values.stride_h, t, KEY_TENSORS), ALIGN)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.range(0, n, BLOCK_N):
        m_n = j + tl.arange(0, BLOCK_N) < n
        p_tile = p_v + tl.multiple_of(tl.cast(j, tl.int64) * stride, ALIGN)
        b_v = load_tile(p_tile, stride, m_n, 0, BLOCK_D, D, BLOCK_N, ALIGN, True)  # (BLOCK_N, BLOCK_D)
        b_sum += tl.sum(b_v.to(tl.float32), 0)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_sums + tl.program_id(0).to(tl.int64) * D + o_d, b_sum, mask=o_d < D)


def value_sums(
    values: KeyTensors,
    batch: int,
    key_segments: int,
    block_n: int,
    key_starts: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Sum of the valid values of each key segment.

    Args:
        values: v.
        batch: output items B.
        key_segments: C.
        block_n: keys of a tile; it fixes the order of the sum.
        key_starts: (1|B, C + 1) int32, None for one segment.
        valid: (B, C) int32, None for all.

    Returns:
        (B, Hkv, C, D) float32.
    """
    v = values.ps[0]
    kv_heads, dim = v.shape[2:]
    sums = torch.empty(batch, kv_heads, key_segments, dim, dtype=torch.float32, device=v.device)
    value_sums_kernel[(batch * kv_heads * key_segments,)](
        values,
        sums,
        key_starts,
        valid,
        item_stride(key_starts),
        batch,
        kv_heads,
        v.shape[1],
        key_segments,
        KEY_TENSORS=len(values.ps),
        D=dim,
        BLOCK_N=block_n,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        ALIGN=alignment(values.ps),
        num_warps=4,
    )
    return sums


@triton.jit(
    do_not_specialize=["stride_starts", "n_heads", "n_row_blocks", "n_row_segments", "n_key_segments"]
)
def sum_mass_kernel(
    p_partial,  # (B, H, row blocks * PARTIALS, C) float32
    p_mass,  # (B, H, R, C) float32, written
    p_row_starts,  # (1|B, R + 1) int32
    stride_starts,
    n_heads,
    n_row_blocks,  # row blocks * PARTIALS
    n_row_segments,
    n_key_segments,
    PARTIALS: tl.constexpr,  # partial masses of one row block
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per item and head."""
    bh = tl.program_id(0).to(tl.int64)
    p_starts = p_row_starts + (bh // n_heads) * stride_starts
    p_partial += bh * n_row_blocks * n_key_segments
    p_mass += bh * n_row_segments * n_key_segments
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < n_key_segments
    seen = 0
    for r in range(0, n_row_segments):
        end = seen + tl.cdiv(tl.load(p_starts + r + 1) - tl.load(p_starts + r), BLOCK_M) * PARTIALS
        b_mass = tl.zeros([BLOCK_C], tl.float32)
        for t in range(seen, end, BLOCK_T):
            o_t = t + tl.arange(0, BLOCK_T)
            o_partial = o_t[:, None] * n_key_segments + o_c[None, :]
            b_partial = tl.load(p_partial + o_partial, mask=(o_t < end)[:, None] & m_c[None, :], other=0.0)
            b_mass += tl.sum(b_partial, 0)  # (BLOCK_T, BLOCK_C) -> (BLOCK_C,)
        tl.store(p_mass + r * n_key_segments + o_c, b_mass, mask=m_c)
        seen = end


def sum_mass(
    partial: Tensor, row_starts: Tensor, row_segments: int, block_m: int, partials: int = 1
) -> Tensor:
    """Sum partial masses over the row blocks of each row segment.

    Args:
        partial: (B, H, row blocks * partials, C) float32.
        row_starts: (1|B, R + 1) int32.
        row_segments: R.
        block_m: rows of a row block.
        partials: partial masses of one row block.

    Returns:
        (B, H, R, C) float32.
    """
    batch, heads, row_blocks, key_segments = partial.shape
    mass = torch.empty(batch, heads, row_segments, key_segments, dtype=torch.float32, device=partial.device)
    sum_mass_kernel[(batch * heads,)](
        partial,
        mass,
        row_starts,
        item_stride(row_starts),
        heads,
        row_blocks,
        row_segments,
        key_segments,
        PARTIALS=partials,
        BLOCK_M=block_m,
        BLOCK_T=32,
        BLOCK_C=triton.next_power_of_2(key_segments),
        num_warps=4,
    )
    return mass


@triton.jit(
    do_not_specialize=["p_span", "p_floor", "stride_starts", "n_heads", "n_row_segments", "n_key_segments"]
)
def head_gain_kernel(
    p_mass,  # (B, H, R, C) float32
    p_gain,  # (B, H, R) float32, written
    p_given,  # (1|B, 1|H, R) float32, or None
    p_rule,  # (2 R + C,) int32
    p_span,  # one float32; also p_floor
    p_floor,
    p_row_starts,  # (1|B, R + 1) int32
    stride_starts,
    stride_given,  # (item, head), 0 broadcasts
    n_heads,
    n_row_segments,
    n_key_segments,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per item: m = mass of the block / its rows (BLOCK_H,), then floor + span * norm(m)."""
    b = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    o_c = tl.arange(0, BLOCK_C)
    m_h = o_h < n_heads
    p_mass += b * n_heads * n_row_segments * n_key_segments
    b_counted = tl.load(p_rule + 2 * n_row_segments + o_c, mask=o_c < n_key_segments, other=0) != 0
    b_m = tl.zeros([BLOCK_H], tl.float32)
    rows = 0
    for r in range(0, n_row_segments):
        if tl.load(p_rule + r) != 0:
            p_starts = p_row_starts + b * stride_starts + r
            rows += tl.load(p_starts + 1) - tl.load(p_starts)
            o_mass = (o_h[:, None] * n_row_segments + r) * n_key_segments + o_c[None, :]
            b_m += tl.sum(tl.load(p_mass + o_mass, mask=m_h[:, None] & b_counted[None, :], other=0.0), 1)
    b_m = b_m / tl.maximum(rows, 1).to(tl.float32)
    eps = 1.1920928955078125e-07  # of float32
    if NORM == "minmax":
        low = tl.min(tl.where(m_h, b_m, float("inf")), 0)
        high = tl.max(tl.where(m_h, b_m, float("-inf")), 0)
        b_m = (b_m - low) / (high - low + eps)
    elif NORM == "mean":
        b_m = b_m / tl.maximum(tl.sum(tl.where(m_h, b_m, 0.0), 0) / n_heads, eps)
    elif NORM == "max":
        b_m = b_m / tl.maximum(tl.max(tl.where(m_h, b_m, 0.0), 0), eps)
    else:  # softmax, times the number of heads
        b_e = tl.where(m_h, tl.exp(b_m - tl.max(tl.where(m_h, b_m, float("-inf")), 0)), 0.0)
        b_m = n_heads * b_e / tl.sum(b_e, 0)
    b_derived = tl.load(p_floor) + tl.load(p_span) * b_m
    for r in range(0, n_row_segments):
        b_gain = tl.where(tl.load(p_rule + n_row_segments + r) != 0, b_derived, 1.0)
        if p_given is not None:
            b_gain *= tl.load(p_given + b * stride_given[0] + o_h * stride_given[1] + r, mask=m_h, other=0.0)
        tl.store(p_gain + (b * n_heads + o_h) * n_row_segments + r, b_gain, mask=m_h)


def head_gain(
    mass: Tensor,
    rule: Tensor,
    row_starts: Tensor,
    norm: str,
    span: Tensor,
    floor: Tensor,
    given: Tensor | None = None,
) -> Tensor:
    """Gain derived from the mass, times a given gain: In-Context Brush (arXiv 2505.20271), Eqs. 6 to 8.

    Args:
        mass: (B, H, R, C) float32.
        rule: (2 R + C,) int32 flags: rows whose mass counts, rows that are scaled, keys whose mass counts.
        row_starts: (1|B, R + 1) int32.
        norm: "minmax", "mean", "max" or "softmax", over the heads.
        span: one float32.
        floor: one float32.
        given: (1|B, 1|H, R) float32, contiguous.

    Returns:
        (B, H, R) float32: floor + span * norm(mass / rows), 1 for rows that are not scaled, times the
            given gain.
    """
    batch, heads, row_segments, key_segments = mass.shape
    gain = torch.empty(batch, heads, row_segments, dtype=torch.float32, device=mass.device)
    head_gain_kernel[(batch,)](
        mass,
        gain,
        given,
        rule,
        span,
        floor,
        row_starts,
        item_stride(row_starts),
        (0, 0) if given is None else (item_stride(given), given.stride(1) * (given.shape[1] > 1)),
        heads,
        row_segments,
        key_segments,
        NORM=norm,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_C=triton.next_power_of_2(key_segments),
        num_warps=4,
    )
    return gain


@triton.jit(do_not_specialize=["stride_starts", "n_heads", "n_rows", "n_row_blocks", "n_row_segments"])
def scale_rows_kernel(
    p_out,  # (B, M, H, D), scaled in place
    p_gain,  # (B, H, R) float32
    p_row_starts,  # (1|B, R + 1) int32
    stride_out,  # (item, row, head)
    stride_starts,
    n_heads,
    n_rows,
    n_row_blocks,
    n_row_segments,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """One program per item, head and row block; a segment whose gain is 1 is neither read nor written."""
    bh = tl.program_id(0) // n_row_blocks
    b = (bh // n_heads).to(tl.int64)
    h = (bh % n_heads).to(tl.int64)
    p_starts = p_row_starts + b * stride_starts
    r, first, end = find_rows(tl.program_id(0) % n_row_blocks, p_starts, n_row_segments, n_rows, BLOCK_M)
    gain = tl.load(p_gain + bh.to(tl.int64) * n_row_segments + r)
    if (first < end) & (gain != 1.0):
        o_m = tl.arange(0, BLOCK_M)
        o_d = tl.arange(0, BLOCK_D)
        p_out += tl.multiple_of(b * stride_out[0], ALIGN) + tl.multiple_of(h * stride_out[2], ALIGN)
        p_out += tl.multiple_of(tl.cast(first, tl.int64) * stride_out[1], ALIGN)
        # (BLOCK_M, BLOCK_D)
        p_tile = p_out + tl.multiple_of(o_m * stride_out[1], ALIGN)[:, None] + o_d[None, :]
        mask = (first + o_m < end)[:, None] & (o_d < D)[None, :]
        b_out = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32) * gain
        tl.store(p_tile, rounded(b_out, p_out.dtype.element_ty, EMULATE_BF16), mask=mask)


def scale_rows(
    out: Tensor, gain: Tensor, row_starts: Tensor, block_m: int, row_blocks: int, emulate_bf16: bool
) -> None:
    """Multiply out by the gain in place.

    Args:
        out: (B, M, H, D).
        gain: (B, H, R) float32.
        row_starts: (1|B, R + 1) int32.
        block_m: rows of a program.
        row_blocks: programs of one item and head.
        emulate_bf16: out is bfloat16 and Triton interprets.
    """
    batch, rows, heads, dim = out.shape
    scale_rows_kernel[(row_blocks * batch * heads,)](
        out,
        gain,
        row_starts,
        (out.stride(0), out.stride(1), out.stride(2)),
        item_stride(row_starts),
        heads,
        rows,
        row_blocks,
        gain.shape[2],
        D=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_M=block_m,
        ALIGN=alignment([out]),
        EMULATE_BF16=emulate_bf16,
        num_warps=4,
    )

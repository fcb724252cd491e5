"""Mass of the columns of the attention map: sum_i p_ij over the rows i of some segments, for every key j.

    p_ij = exp(scale * <q_i, k_j> + bias[a(i), c(j)] - lse_i)

A program owns a block of keys and walks the row segments, so that every sum has one owner and one order.

Verified in Triton's interpreter and compiled for GPUs that are not there; not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .blocks import (
    LOG2E,
    Traits,
    exponent_shift,
    find_keys,
    item_strides,
    labels_of,
    lane_bias,
    list_strides,
    load_keys,
    load_rows,
    open_tensor,
    row_products,
    token_at,
    token_strides,
)

UNSPECIALIZED = [
    "stride_tables",
    "stride_starts",
    "n_items",
    "n_heads",
    "n_rows",
    "n_keys",
    "n_key_blocks",
    "n_row_segments",
    "n_key_segments",
    "n_pieces",
    "n_groups",
]


@triton.jit
def mass_tile(
    b_mass,
    b_k,
    p_q,
    stride_q,
    p_lse,
    n_groups,
    g,
    m,
    end,
    m_lane,
    scale,
    b_offset,
    MASKED: tl.constexpr,
    T: tl.constexpr,
):
    """b_mass + sum of p over the rows from row m on; the pointers stand at row 0"""
    o_m = m + tl.arange(0, T.BLOCK_M)
    m_m = o_m < end
    p_q += tl.multiple_of(tl.cast(m, tl.int64) * stride_q[1], T.ALIGN)
    b_q = load_rows(p_q, stride_q[1], m_m, T.BLOCK_M, MASKED, T)
    b_lse = exponent_shift(p_lse, o_m, n_groups, g, m_m)
    b_p = tl.exp2(row_products(b_k, b_q, T) * scale + (b_offset[:, None] - b_lse[None, :]))
    if MASKED:
        b_p = tl.where(m_m[None, :], b_p, 0.0)
    if T.LANES:
        b_p = tl.where(m_lane[:, None], b_p, 0.0)
    return b_mass + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def column_mass_kernel(
    p_q,  # (batch, M, H, D)
    p_ks,  # tuple of T.TENSORS: (batch, N, Hkv, D), or (batch, keys of segment c, Hkv, D)
    p_mass,  # (B, H, N) float32
    p_lse,  # (B, H, M, G) float32
    p_counted,  # (R,) int32: whether the row segment counts
    p_row_starts,  # (1|B, R + 1) int32
    p_key_starts,  # (1|B, P + 1) int32 starts of the key pieces, or None: one
    p_groups,  # (P,) int32 group of each piece, or None: one group
    # (P,) int32 segment of each piece, -1: several short ones; or None: the pieces are the segments
    p_segments,
    p_labels,  # (N,) int32 segment of each key, where p_segments holds a -1
    p_valid,  # (B, C) int32, or None
    p_source_q,  # (B,) int64, or None
    p_source_k,  # (T.TENSORS, B) int64, or None
    p_scales,  # (1|B, 1|H) float32, or None
    p_bias,  # (1|B, 1|H, R, C) float32, or None
    stride_q,  # (item, row, head)
    stride_kb,  # one per tensor; 0 where a batch of 1 broadcasts
    stride_kn,
    stride_kh,
    stride_tables,  # (item, head) of scales and bias; 0 broadcasts
    stride_starts,  # of an item in p_row_starts and p_key_starts
    scale,
    n_items,
    n_heads,
    n_rows,
    n_keys,  # of all tensors
    n_key_blocks,
    n_row_segments,
    n_key_segments,
    n_pieces,
    n_groups,
    T: tl.constexpr,
):
    block = tl.program_id(0) % n_key_blocks
    b = tl.program_id(0) // n_key_blocks // n_heads
    h = tl.program_id(0) // n_key_blocks % n_heads
    p_row_starts += b * stride_starts[0]
    if p_key_starts is not None:
        p_key_starts += b * stride_starts[1]
    c, g, first, start, end, limit = find_keys(
        block, b, p_key_starts, p_segments, p_groups, p_valid, n_keys, n_pieces, n_key_segments, T
    )
    if T.RAGGED:
        if first >= end:
            return
    o_n = first + tl.arange(0, T.BLOCK_N)
    m_n = o_n < limit
    b_label, m_label = labels_of(c, p_labels, o_n, m_n, T)
    h_kv = h // T.HEADS_PER_KV
    keys = open_tensor(
        p_ks, stride_kb, stride_kn, stride_kh, p_source_k, None, None, b, h_kv, c, start, n_items, T
    )
    b_k = load_keys(keys, 0, m_n, True, T)
    q_item = b.to(tl.int64)
    if p_source_q is not None:
        q_item = tl.load(p_source_q + b)
    p_q = token_at(p_q, stride_q, q_item, 0, h, T)
    head = (b * n_heads + h).to(tl.int64)
    p_lse += head * n_rows * n_groups
    if p_scales is not None:
        scale = tl.load(p_scales + b * stride_tables[0] + h * stride_tables[1])
    scale = scale * LOG2E

    b_mass = tl.zeros([T.BLOCK_N], tl.float32)
    for r in range(0, n_row_segments):
        m = tl.load(p_row_starts + r)
        stop = tl.load(p_row_starts + r + 1)
        o_bias = b * stride_tables[2] + h * stride_tables[3] + r * n_key_segments
        b_offset, m_lane, seen = lane_bias(p_bias, o_bias, b_label, m_label, T)
        stop = tl.where((seen != 0) & (tl.load(p_counted + r) != 0), stop, m)
        full = m + (stop - m) // T.BLOCK_M * T.BLOCK_M
        for j in tl.range(m, full, T.BLOCK_M):
            b_mass = mass_tile(
                b_mass, b_k, p_q, stride_q, p_lse, n_groups, g, j, stop, m_lane, scale, b_offset, False, T
            )
        if full < stop:
            b_mass = mass_tile(
                b_mass, b_k, p_q, stride_q, p_lse, n_groups, g, full, stop, m_lane, scale, b_offset, True, T
            )
    tl.store(p_mass + head * n_keys + o_n, tl.where(m_n, b_mass, 0.0), mask=o_n < end)


def column_mass(
    q: Tensor,
    ks: Sequence[Tensor],
    lse: Tensor,
    mass: Tensor,
    counted: Tensor,
    traits: Traits,
    *,
    warps: int,
    stages: int,
    key_blocks: int,
    row_starts: Tensor,
    key_segments: int = 1,
    pieces: int = 1,
    groups: int = 1,
    scale: float = 1.0,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    key_starts: Tensor | None = None,
    piece_groups: Tensor | None = None,
    segments: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    source_q: Tensor | None = None,
    source_k: Tensor | None = None,
) -> None:
    """Launch the kernel; it writes mass. Shapes and dtypes are those beside the kernel's pointers.

    key_blocks: programs per item and head, at least the sum over pieces of ceil(length / BLOCK_N).
    """
    batch, heads, keys = mass.shape
    column_mass_kernel[(key_blocks * batch * heads,)](
        q,
        tuple(ks),
        mass,
        lse,
        counted,
        row_starts,
        key_starts,
        piece_groups,
        segments,
        labels,
        valid,
        source_q,
        source_k,
        scales,
        bias,
        stride_q=token_strides(q),
        **list_strides("k", ks, source_k),
        stride_tables=tuple(s for t in (scales, bias) for s in item_strides(t)),
        stride_starts=(item_strides(row_starts)[0], item_strides(key_starts)[0]),
        scale=scale,
        n_items=batch,
        n_heads=heads,
        n_rows=q.shape[1],
        n_keys=keys,
        n_key_blocks=key_blocks,
        n_row_segments=counted.shape[0],
        n_key_segments=key_segments,
        n_pieces=pieces,
        n_groups=groups,
        T=traits.constants(),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )

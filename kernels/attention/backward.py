"""Segment-controlled attention, gradient of the queries, the keys and the values.

    a_ij = gain[a(i)] * gate_g(i) * weight[a(i), c(j)]         dP_ij = a_ij * <do_i, v_j>
    delta_g(i) = sum_{j in g} p_ij dP_ij                        dS_ij = p_ij * (dP_ij - delta_g(i))
    dq_i = scale * sum_j dS_ij k_j      dk_j = scale * sum_i dS_ij q_i      dv_j = sum_i a_ij p_ij do_i

The map is recomputed from lse, in tiles. One kernel owns blocks of rows: it writes dq, and delta for the
other one, which owns blocks of keys. Every sum has one owner and one order, so that a rerun gives the same
bits. With one group delta is <do_i, o_i>; with several it takes a sweep of its own, as <do_i, o_i> of the
total is no group's.

Verified in Triton's interpreter and compiled for GPUs that are not there; not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..segments import find_rows
from .blocks import (
    LOG2E,
    Traits,
    combined,
    exponent_shift,
    find_keys,
    item_strides,
    labels_of,
    lane_bias,
    list_strides,
    load_keys,
    load_rows,
    load_weight,
    open_lanes,
    open_pair,
    open_tensor,
    row_products,
    scaled,
    segment_of,
    store_rows,
    token_at,
    token_strides,
    zeros,
)

# Sizes whose every new value would otherwise compile again.
UNSPECIALIZED = [
    "stride_tables",
    "stride_starts",
    "n_items",
    "n_heads",
    "n_rows",
    "n_keys",
    "n_row_blocks",
    "n_key_blocks",
    "n_row_segments",
    "n_key_segments",
    "n_pieces",
    "n_groups",
]


@triton.jit
def query_tile(
    b_q,
    b_dout,
    b_lse,
    b_delta,
    b_factor,
    b_dq,
    keys,
    values,
    j,
    m_k,
    m_v,
    scale,
    b_offset,
    b_weight,
    DELTA: tl.constexpr,
    MASKED: tl.constexpr,
    T: tl.constexpr,
):
    """One tile of keys: b_delta gains sum_j p dP if DELTA, else b_dq gains dS K; offset and weight are
    (1|BLOCK_N,)
    """
    b_k = load_keys(keys, j, m_k, MASKED, T)
    b_p = tl.exp2(row_products(b_q, b_k, T) * scale + (b_offset[None, :] - b_lse[:, None]))
    if MASKED:
        b_p = tl.where(m_k[None, :], b_p, 0.0)
    b_v = load_keys(values, j, m_v, MASKED, T)
    b_dp = row_products(b_dout, b_v, T) * (b_factor[:, None] * b_weight[None, :])
    if not MASKED:
        b_dp = tl.where((b_weight != 0)[None, :], b_dp, 0.0)  # such values may be NaN
    if DELTA:
        b_delta += tl.sum(b_p * b_dp, 1)
    else:
        b_dq = combined(b_dq, b_p * (b_dp - b_delta[:, None]), b_k, T)
    return b_delta, b_dq


@triton.jit
def query_sweep(
    b_q,
    b_dout,
    b_lse,
    b_delta,
    b_factor,
    b_dq,
    keys,
    values,
    start,
    n,
    mixed,
    scale,
    offset,
    weight,
    p_labels,
    p_bias,
    p_weight,
    DELTA: tl.constexpr,
    T: tl.constexpr,
):
    """The n keys of a piece: full tiles, then the tail; or tiles of mixed segments"""
    full = n // T.BLOCK_N * T.BLOCK_N
    if T.LANES:
        full = tl.where(mixed, 0, full)
    b_offset = tl.full([1], offset, tl.float32)
    b_weight = tl.full([1], weight, tl.float32)
    for j in tl.range(0, full, T.BLOCK_N):
        b_delta, b_dq = query_tile(
            b_q,
            b_dout,
            b_lse,
            b_delta,
            b_factor,
            b_dq,
            keys,
            values,
            j,
            None,
            None,
            scale,
            b_offset,
            b_weight,
            DELTA,
            False,
            T,
        )
    for j in tl.range(full, n, T.BLOCK_N):
        o_n = j + tl.arange(0, T.BLOCK_N)
        m_k = o_n < n
        m_v = m_k & (b_weight != 0)
        if T.LANES:
            m_lane, m_value, b_bias, b_lane = open_lanes(
                p_labels, p_bias, p_weight, start + o_n, o_n < tl.where(mixed, n, 0)
            )
            m_k = tl.where(mixed, m_lane, m_k)
            m_v = tl.where(mixed, m_value, m_v)
            b_lane_offset = tl.where(mixed, b_bias, b_offset)
            b_lane_weight = tl.where(mixed, b_lane, b_weight)
            b_delta, b_dq = query_tile(
                b_q,
                b_dout,
                b_lse,
                b_delta,
                b_factor,
                b_dq,
                keys,
                values,
                j,
                m_k,
                m_v,
                scale,
                b_lane_offset,
                b_lane_weight,
                DELTA,
                True,
                T,
            )
        else:
            b_delta, b_dq = query_tile(
                b_q,
                b_dout,
                b_lse,
                b_delta,
                b_factor,
                b_dq,
                keys,
                values,
                j,
                m_k,
                m_v,
                scale,
                b_offset,
                b_weight,
                DELTA,
                True,
                T,
            )
    return b_delta, b_dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_gradient_kernel(
    p_q,  # (batch, M, H, D)
    p_ks,  # tuple of T.TENSORS: (batch, N, Hkv, D), or (batch, keys of segment c, Hkv, D)
    p_vs,
    p_out,  # (B, M, H, D)
    p_dout,
    p_dq,
    p_lse,  # (B, H, M, G) float32
    p_delta,  # (B, H, M, G) float32, written
    p_gain,  # (B, H, R) float32
    p_gates,  # (1|B, 1|M, G) float32, or None
    p_row_starts,  # (1|B, R + 1) int32
    p_key_starts,  # (1|B, P + 1) int32 starts of the key pieces, or None: one
    # (P + G + 1,) int32: the pieces sorted by group, then each group's first place; or None: one group
    p_order,
    # (P,) int32 segment of each piece, -1: several short ones; or None: the pieces are the segments
    p_segments,
    p_labels,  # (N,) int32 segment of each key, where p_segments holds a -1
    p_valid,  # (B, C) int32, or None
    p_source_q,  # (B,) int64, or None
    p_source_k,  # (T.TENSORS, B) int64, or None
    p_source_v,
    p_scales,  # (1|B, 1|H) float32, or None
    p_bias,  # (1|B, 1|H, R, C) float32, or None; also p_weight
    p_weight,
    stride_q,  # (item, row, head)
    stride_out,
    stride_dout,
    stride_dq,
    stride_kb,  # one per tensor; 0 where a batch of 1 broadcasts
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_tables,  # (item, head) of scales, bias, weight and gain, then (item, row) of gates; 0 broadcasts
    stride_starts,  # of an item in p_row_starts and p_key_starts
    scale,
    n_items,
    n_heads,
    n_rows,
    n_keys,
    n_row_blocks,
    n_row_segments,
    n_key_segments,
    n_pieces,
    n_groups,
    T: tl.constexpr,
):
    block = tl.program_id(0) % n_row_blocks
    b = tl.program_id(0) // n_row_blocks // n_heads
    h = tl.program_id(0) // n_row_blocks % n_heads
    h_kv = h // T.HEADS_PER_KV
    p_row_starts += b * stride_starts[0]
    if p_key_starts is not None:
        p_key_starts += b * stride_starts[1]
    r, first, end = find_rows(block, p_row_starts, n_row_segments, n_rows, T.BLOCK_M)
    if T.RAGGED:
        if first >= end:
            return
    m_m = first + tl.arange(0, T.BLOCK_M) < end

    q_item = b.to(tl.int64)
    if p_source_q is not None:
        q_item = tl.load(p_source_q + b)
    b_q = load_rows(token_at(p_q, stride_q, q_item, first, h, T), stride_q[1], m_m, T.BLOCK_M, True, T)
    b_dout = load_rows(token_at(p_dout, stride_dout, b, first, h, T), stride_dout[1], m_m, T.BLOCK_M, True, T)
    if p_scales is not None:
        scale = tl.load(p_scales + b * stride_tables[0] + h * stride_tables[1])
    if p_bias is not None:
        p_bias += b * stride_tables[2] + h * stride_tables[3] + r * n_key_segments
    if p_weight is not None:
        p_weight += b * stride_tables[4] + h * stride_tables[5] + r * n_key_segments
    gain = tl.load(p_gain + b * stride_tables[6] + h * stride_tables[7] + r)
    o_row = (b * n_heads + h).to(tl.int64) * n_rows + first + tl.arange(0, T.BLOCK_M)

    b_dq = zeros(T.BLOCK_M, T)
    for g in range(0, n_groups if T.GROUPED else 1):
        b_lse = exponent_shift(p_lse, o_row, n_groups, g, m_m)
        b_factor = tl.full([T.BLOCK_M], gain, tl.float32)
        if p_gates is not None:
            o_gate = (first + tl.arange(0, T.BLOCK_M)) * stride_tables[9] + g
            b_factor *= tl.load(p_gates + b * stride_tables[8] + o_gate, mask=m_m, other=0.0)
        b_delta = tl.zeros([T.BLOCK_M], tl.float32)
        place = 0
        last = n_pieces
        if T.GROUPED:
            place = tl.load(p_order + n_pieces + g)
            last = tl.load(p_order + n_pieces + g + 1)
        else:
            b_out = load_rows(
                token_at(p_out, stride_out, b, first, h, T), stride_out[1], m_m, T.BLOCK_M, True, T
            )
            for d in tl.static_range(T.N_PARTS):
                b_delta += tl.sum(b_dout[d].to(tl.float32) * b_out[d].to(tl.float32), 1)
        for sweep in tl.static_range(0 if T.GROUPED else 1, 2):  # delta, then dq
            for place_i in range(place, last):
                i = place_i
                if T.GROUPED:
                    i = tl.load(p_order + place_i)
                c = segment_of(i, p_segments)
                start, n, offset = open_pair(
                    i, c, b, p_key_starts, n_keys, n_key_segments, p_valid, p_bias, T
                )
                keys = open_tensor(
                    p_ks,
                    stride_kb,
                    stride_kn,
                    stride_kh,
                    p_source_k,
                    None,
                    None,
                    b,
                    h_kv,
                    c,
                    start,
                    n_items,
                    T,
                )
                values = open_tensor(
                    p_vs,
                    stride_vb,
                    stride_vn,
                    stride_vh,
                    p_source_v,
                    None,
                    None,
                    b,
                    h_kv,
                    c,
                    start,
                    n_items,
                    T,
                )
                weight = load_weight(p_weight, c, T)
                b_delta, b_dq = query_sweep(
                    b_q,
                    b_dout,
                    b_lse,
                    b_delta,
                    b_factor,
                    b_dq,
                    keys,
                    values,
                    start,
                    n,
                    c < 0,
                    scale * LOG2E,
                    offset,
                    weight,
                    p_labels,
                    p_bias,
                    p_weight,
                    sweep == 0,
                    T,
                )
        tl.store(p_delta + o_row * n_groups + g, b_delta, mask=m_m)
    store_rows(
        token_at(p_dq, stride_dq, b, first, h, T), stride_dq[1], scaled(b_dq, scale, T), m_m, T.BLOCK_M, T
    )


@triton.jit
def kept(b_x, m_n, T: tl.constexpr):
    b_y = (tl.where(m_n[:, None], b_x[0], 0.0),)
    for i in tl.static_range(1, T.N_PARTS):
        b_y += (tl.where(m_n[:, None], b_x[i], 0.0),)
    return b_y


@triton.jit
def key_tile(
    b_k,
    b_v,
    b_dk,
    b_dv,
    p_q,
    p_dout,
    p_lse,
    p_delta,
    p_gates,
    stride_q,
    stride_dout,
    stride_gates,
    n_groups,
    g,
    m,
    end,
    m_lane,
    scale,
    b_offset,
    b_weight,
    gain,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    T: tl.constexpr,
):
    """One tile of rows from row m on; the pointers stand at row 0. b_dk gains dS^T Q, b_dv gains (a P)^T dO.

    m_lane: the keys that these rows see, where they are of several segments.
    """
    o_m = m + tl.arange(0, T.BLOCK_M)
    m_m = o_m < end
    p_q += tl.multiple_of(tl.cast(m, tl.int64) * stride_q[1], T.ALIGN)
    p_dout += tl.multiple_of(tl.cast(m, tl.int64) * stride_dout[1], T.ALIGN)
    b_q = load_rows(p_q, stride_q[1], m_m, T.BLOCK_M, MASKED, T)
    b_lse = exponent_shift(p_lse, o_m, n_groups, g, m_m)
    b_p = tl.exp2(row_products(b_k, b_q, T) * (scale * LOG2E) + (b_offset[:, None] - b_lse[None, :]))
    if MASKED:
        b_p = tl.where(m_m[None, :], b_p, 0.0)
    if T.LANES:
        b_p = tl.where(m_lane[:, None], b_p, 0.0)
    b_dout = load_rows(p_dout, stride_dout[1], m_m, T.BLOCK_M, MASKED, T)
    b_factor = gain * b_weight[:, None]
    if p_gates is not None:
        b_factor = b_factor * tl.load(p_gates + o_m * stride_gates + g, mask=m_m, other=0.0)[None, :]
    b_dv = combined(b_dv, b_p * b_factor, b_dout, T)
    b_dp = tl.where(
        (b_weight != 0)[:, None], row_products(b_v, b_dout, T) * b_factor, 0.0
    )  # such values may be NaN
    b_delta = tl.load(p_delta + o_m * n_groups + g, mask=m_m, other=0.0)
    b_ds = b_p * (b_dp - b_delta[None, :])
    if SCALED:
        b_ds *= scale
    return combined(b_dk, b_ds, b_q, T), b_dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_gradient_kernel(
    p_q,  # as in query_gradient_kernel
    p_ks,
    p_vs,
    p_dout,
    p_dks,  # tuple of T.TENSORS: like p_ks, but one item for each output item
    p_dvs,
    p_lse,
    p_delta,  # (B, H, M, G) float32, from query_gradient_kernel
    p_gain,
    p_gates,
    p_row_starts,
    p_key_starts,
    p_groups,  # (P,) int32 group of each piece, or None: one group
    p_segments,
    p_labels,
    p_valid,
    p_source_q,
    p_source_k,
    p_source_v,
    p_scales,
    p_bias,
    p_weight,
    stride_q,
    stride_dout,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_dkb,
    stride_dkn,
    stride_dkh,
    stride_dvb,
    stride_dvn,
    stride_dvh,
    stride_tables,
    stride_starts,
    scale,
    n_items,
    n_heads,
    n_rows,
    n_keys,
    n_key_blocks,
    n_row_segments,
    n_key_segments,
    n_pieces,
    n_groups,
    T: tl.constexpr,
):
    block = tl.program_id(0) % n_key_blocks
    n_kv_heads = n_heads // T.HEADS_PER_KV
    b = tl.program_id(0) // n_key_blocks // n_kv_heads
    h_kv = tl.program_id(0) // n_key_blocks % n_kv_heads
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

    keys = open_tensor(
        p_ks, stride_kb, stride_kn, stride_kh, p_source_k, None, None, b, h_kv, c, start, n_items, T
    )
    values = open_tensor(
        p_vs, stride_vb, stride_vn, stride_vh, p_source_v, None, None, b, h_kv, c, start, n_items, T
    )
    b_k = load_keys(keys, 0, m_n, True, T)
    b_v = load_keys(values, 0, m_n, True, T)
    b_dk = zeros(T.BLOCK_N, T)
    b_dv = zeros(T.BLOCK_N, T)
    q_item = b.to(tl.int64)
    if p_source_q is not None:
        q_item = tl.load(p_source_q + b)
    for h in range(h_kv * T.HEADS_PER_KV, (h_kv + 1) * T.HEADS_PER_KV):
        p_q_head = token_at(p_q, stride_q, q_item, 0, h, T)
        p_dout_head = token_at(p_dout, stride_dout, b, 0, h, T)
        o_head = tl.cast(b * n_heads + h, tl.int64) * n_rows * n_groups
        p_gates_item = p_gates
        if p_gates is not None:
            p_gates_item += b * stride_tables[8]
        if p_scales is not None:
            scale = tl.load(p_scales + b * stride_tables[0] + h * stride_tables[1])
        for r in range(0, n_row_segments):
            m = tl.load(p_row_starts + r)
            stop = tl.load(p_row_starts + r + 1)
            gain = tl.load(p_gain + b * stride_tables[6] + h * stride_tables[7] + r)
            o_bias = b * stride_tables[2] + h * stride_tables[3] + r * n_key_segments
            b_offset, m_lane, seen = lane_bias(p_bias, o_bias, b_label, m_label, T)
            stop = tl.where(seen != 0, stop, m)
            b_weight = tl.full(b_label.shape, 1.0, tl.float32)
            if p_weight is not None:
                o_weight = b * stride_tables[4] + h * stride_tables[5] + r * n_key_segments
                b_weight = tl.load(p_weight + o_weight + b_label, mask=m_label, other=0.0)
            if T.LANES:
                b_weight = tl.where(m_lane, b_weight, 0.0)
            full = m + (stop - m) // T.BLOCK_M * T.BLOCK_M
            for j in tl.range(m, full, T.BLOCK_M):
                b_dk, b_dv = key_tile(
                    b_k,
                    b_v,
                    b_dk,
                    b_dv,
                    p_q_head,
                    p_dout_head,
                    p_lse + o_head,
                    p_delta + o_head,
                    p_gates_item,
                    stride_q,
                    stride_dout,
                    stride_tables[9],
                    n_groups,
                    g,
                    j,
                    stop,
                    m_lane,
                    scale,
                    b_offset,
                    b_weight,
                    gain,
                    False,
                    p_scales is not None,
                    T,
                )
            if full < stop:
                b_dk, b_dv = key_tile(
                    b_k,
                    b_v,
                    b_dk,
                    b_dv,
                    p_q_head,
                    p_dout_head,
                    p_lse + o_head,
                    p_delta + o_head,
                    p_gates_item,
                    stride_q,
                    stride_dout,
                    stride_tables[9],
                    n_groups,
                    g,
                    full,
                    stop,
                    m_lane,
                    scale,
                    b_offset,
                    b_weight,
                    gain,
                    True,
                    p_scales is not None,
                    T,
                )
    if p_scales is None:
        b_dk = scaled(b_dk, scale, T)
    m_stored = o_n < end
    dk = open_tensor(
        p_dks, stride_dkb, stride_dkn, stride_dkh, None, None, None, b, h_kv, c, start, n_items, T
    )
    store_rows(dk[0], dk[1], kept(b_dk, m_n, T), m_stored, T.BLOCK_N, T)
    dv = open_tensor(
        p_dvs, stride_dvb, stride_dvn, stride_dvh, None, None, None, b, h_kv, c, start, n_items, T
    )
    store_rows(dv[0], dv[1], kept(b_dv, m_n, T), m_stored, T.BLOCK_N, T)


def attention_backward(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    out: Tensor,
    dout: Tensor,
    dq: Tensor,
    dks: Sequence[Tensor],
    dvs: Sequence[Tensor],
    lse: Tensor,
    delta: Tensor,
    gain: Tensor,
    query: tuple[Traits, int, int],
    key: tuple[Traits, int, int],
    *,
    row_blocks: int,
    key_blocks: int,
    row_starts: Tensor,
    row_segments: int = 1,
    key_segments: int = 1,
    pieces: int = 1,
    groups: int = 1,
    scale: float = 1.0,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    gates: Tensor | None = None,
    key_starts: Tensor | None = None,
    order: Tensor | None = None,
    piece_groups: Tensor | None = None,
    segments: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    source_q: Tensor | None = None,
    source_k: Tensor | None = None,
    source_v: Tensor | None = None,
) -> None:
    """Launch both kernels; they write dq, dks and dvs, and delta on the way.

    Shapes and dtypes are those beside the kernels' pointers; dq, dks and dvs hold one item for each output
    item. query
    and key: traits, warps and stages of the kernel that owns rows and of the one that owns keys. row_blocks
        and
    key_blocks: programs per item and head, at least the sum over segments of ceil(length / BLOCK_M or
        BLOCK_N).
    """
    batch, rows, heads, _ = out.shape
    shared = {
        "stride_q": token_strides(q),
        "stride_dout": token_strides(dout),
        **list_strides("k", ks, source_k),
        **list_strides("v", vs, source_v),
        "stride_tables": tuple(s for t in (scales, bias, weight, gain, gates) for s in item_strides(t)),
        "stride_starts": (item_strides(row_starts)[0], item_strides(key_starts)[0]),
        "scale": scale,
        "n_items": batch,
        "n_heads": heads,
        "n_rows": rows,
        "n_keys": ks[0].shape[1],
        "n_row_segments": row_segments,
        "n_key_segments": key_segments,
        "n_pieces": pieces,
        "n_groups": groups,
    }
    traits, warps, stages = query
    query_gradient_kernel[(row_blocks * batch * heads,)](
        q,
        tuple(ks),
        tuple(vs),
        out,
        dout,
        dq,
        lse,
        delta,
        gain,
        gates,
        row_starts,
        key_starts,
        order,
        segments,
        labels,
        valid,
        source_q,
        source_k,
        source_v,
        scales,
        bias,
        weight,
        stride_out=token_strides(out),
        stride_dq=token_strides(dq),
        n_row_blocks=row_blocks,
        **shared,
        T=traits.constants(),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    traits, warps, stages = key
    key_gradient_kernel[(key_blocks * batch * (heads // traits.HEADS_PER_KV),)](
        q,
        tuple(ks),
        tuple(vs),
        dout,
        tuple(dks),
        tuple(dvs),
        lse,
        delta,
        gain,
        gates,
        row_starts,
        key_starts,
        piece_groups,
        segments,
        labels,
        valid,
        source_q,
        source_k,
        source_v,
        scales,
        bias,
        weight,
        **list_strides("dk", dks, None),
        **list_strides("dv", dvs, None),
        n_key_blocks=key_blocks,
        **shared,
        T=traits.constants(),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )

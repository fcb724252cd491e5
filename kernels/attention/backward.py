"""Segment-controlled attention, gradients of the queries, the keys and the values.

    a_ij = gain[a(i)] * gate_g(i) * weight[a(i), c(j)]         dP_ij = a_ij * <dO_i, v_j>
    delta_g(i) = sum_{j in g} p_ij dP_ij                        dS_ij = p_ij * (dP_ij - delta_g(i))
    dq_i = scale * sum_j dS_ij k_j      dk_j = scale * sum_i dS_ij q_i      dv_j = sum_i a_ij p_ij dO_i

P is recomputed from lse, tile by tile. query_gradient_kernel owns blocks of rows and writes dq, and delta for
key_gradient_kernel, which owns blocks of keys and writes dk and dv. No atomic addition: every sum has one
owner and one order, so that a rerun gives the same bits. With one group delta is <dO_i, o_i>; with several it
takes a sweep of its own, because <dO_i, o_i> sums over all groups.

Verified in Triton's interpreter and compiled for sm_80, sm_90 and sm_120; not yet run on hardware.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..segments import find_rows
from .arguments import Counts, Inputs, KeyTensors, RowTensor
from .blocks import (
    LOG2E,
    MixedTables,
    add_product,
    find_key_block,
    item_starts,
    load_block_bias,
    load_gain,
    load_keys,
    load_labels,
    load_lse_log2,
    load_mixed,
    load_rows,
    load_scale,
    load_weight,
    masked_rows,
    open_keys_values,
    open_range,
    pair_row,
    query_item,
    range_keys,
    range_segment,
    row_products,
    scaled,
    store_rows,
    token_at,
    zeros,
)
from .tiles import TileConfig
from .traits import AttentionTraits


class QueryBlock(NamedTuple):
    """The rows that a program of query_gradient_kernel owns, for one group."""

    q: tl.tensor  # (BLOCK_M, D)
    dout: tl.tensor  # (BLOCK_M, D)
    lse: tl.tensor  # (BLOCK_M,) log2 units
    factor: tl.tensor  # (BLOCK_M,) gain * gate


class RowPointers(NamedTuple):
    """Pointers to row 0 of one head, but for lse and delta, for key_gradient_kernel."""

    q: tl.tensor
    stride_q: tl.tensor
    dout: tl.tensor
    stride_dout: tl.tensor
    lse: tl.tensor  # (B, H, M, G), as delta: at row 0 of the first head
    delta: tl.tensor
    o_head: tl.tensor  # of this head's row 0 in lse and delta
    gates: tl.tensor | None
    stride_gates: tl.tensor


class PairTables(NamedTuple):
    """The control between one row segment and a block of keys; b_label's shape is (BLOCK_N,) or (1,)."""

    bias: tl.tensor  # log2 units, b_label's shape
    weight: tl.tensor  # b_label's shape
    gain: tl.tensor  # of the row segment
    seen: tl.tensor  # keys that the rows see, b_label's shape


@triton.jit
def query_tile(
    rows,
    b_delta,
    b_dq,
    kv,
    j,
    m_k,
    m_v,
    scale_log2,
    b_bias,
    b_weight,
    DELTA: tl.constexpr,
    MASKED: tl.constexpr,
    T: tl.constexpr,
):
    """Keys j .. j + BLOCK_N: add sum_j p dP to b_delta (BLOCK_M,) with DELTA, else dS K to b_dq (BLOCK_M, D).

    rows: QueryBlock; m_k, m_v: (BLOCK_N,) keys to read and keys whose values count; b_bias, b_weight:
    (1|BLOCK_N,).
    """
    b_k = load_keys(kv.k, j, m_k, MASKED, T)  # (BLOCK_N, D)
    b_p = tl.exp2(row_products(rows.q, b_k, T) * scale_log2 + (b_bias[None, :] - rows.lse[:, None]))
    if MASKED:
        b_p = tl.where(m_k[None, :], b_p, 0.0)  # (BLOCK_M, BLOCK_N)
    b_v = load_keys(kv.v, j, m_v, MASKED, T)
    b_dp = row_products(rows.dout, b_v, T) * (rows.factor[:, None] * b_weight[None, :])
    if not MASKED:
        b_dp = tl.where((b_weight != 0)[None, :], b_dp, 0.0)  # values of weight 0 may be NaN
    if DELTA:
        b_delta += tl.sum(b_p * b_dp, 1)
    else:
        b_dq = add_product(b_dq, b_p * (b_dp - b_delta[:, None]), b_k, T)
    return b_delta, b_dq


@triton.jit
def query_sweep(
    rows,
    b_delta,
    b_dq,
    kv,
    c,
    start,
    n,
    scale_log2,
    bias,
    weight,
    tables,
    DELTA: tl.constexpr,
    T: tl.constexpr,
):
    """query_tile over the n keys of a range: full tiles, then the masked tail. Mixed ranges are masked."""
    mixed = c < 0
    full = n // T.BLOCK_N * T.BLOCK_N
    if T.MIXED:
        full = tl.where(mixed, 0, full)
    b_bias = tl.full([1], bias, tl.float32)
    b_weight = tl.full([1], weight, tl.float32)
    for j in tl.range(0, full, T.BLOCK_N):
        b_delta, b_dq = query_tile(
            rows, b_delta, b_dq, kv, j, None, None, scale_log2, b_bias, b_weight, DELTA, False, T
        )
    for j in tl.range(full, n, T.BLOCK_N):
        o_n = j + tl.arange(0, T.BLOCK_N)
        m_k = o_n < n
        m_v = m_k & (b_weight != 0)
        if T.MIXED:
            m_seen, m_value, b_key_bias, b_key_weight = load_mixed(
                tables, start + o_n, o_n < tl.where(mixed, n, 0)
            )
            m_k = tl.where(mixed, m_seen, m_k)
            m_v = tl.where(mixed, m_value, m_v)
            b_tile_bias = tl.where(mixed, b_key_bias, b_bias)  # (BLOCK_N,)
            b_tile_weight = tl.where(mixed, b_key_weight, b_weight)
        else:
            b_tile_bias = b_bias  # (1,)
            b_tile_weight = b_weight
        b_delta, b_dq = query_tile(
            rows, b_delta, b_dq, kv, j, m_k, m_v, scale_log2, b_tile_bias, b_tile_weight, DELTA, True, T
        )
    return b_delta, b_dq


@triton.jit(do_not_specialize=Counts._fields)
def query_gradient_kernel(
    inputs,  # Inputs; tables.gain (B, H, R) is never None
    out,  # RowTensor (B, M, H, D)
    dout,  # RowTensor (B, M, H, D)
    dq,  # RowTensor (B, M, H, D), written
    p_lse,  # (B, H, M, G) float32
    p_delta,  # (B, H, M, G) float32, written
    n_items,
    n_heads,
    n_rows,
    n_keys,
    n_blocks,
    n_row_segments,
    n_key_segments,
    n_ranges,
    n_groups,
    T: tl.constexpr,
):
    """One program per item, head and row block."""
    counts = Counts(
        n_items, n_heads, n_rows, n_keys, n_blocks, n_row_segments, n_key_segments, n_ranges, n_groups
    )
    q, tables, layout = inputs.q, inputs.tables, inputs.layout
    block = tl.program_id(0) % n_blocks
    b = tl.program_id(0) // n_blocks // n_heads
    h = tl.program_id(0) // n_blocks % n_heads
    h_kv = h // T.HEADS_PER_KV
    p_row_starts = item_starts(layout.row_starts, b)
    p_key_starts = item_starts(layout.key_starts, b)
    r, first, end = find_rows(block, p_row_starts, n_row_segments, n_rows, T.BLOCK_M)
    if T.RAGGED:
        if first >= end:
            return
    m_m = first + tl.arange(0, T.BLOCK_M) < end  # (BLOCK_M,)

    p_q = token_at(q.p, q.stride, query_item(q, b), first, h, T)
    b_q = load_rows(p_q, q.stride[1], m_m, T.BLOCK_M, True, T)  # (BLOCK_M, D)
    p_dout = token_at(dout.p, dout.stride, b, first, h, T)
    b_dout = load_rows(p_dout, dout.stride[1], m_m, T.BLOCK_M, True, T)
    scale = inputs.scale
    if tables.scales is not None:
        scale = load_scale(tables.scales, b, h)
    p_bias = pair_row(tables.bias, b, h, r, counts)
    p_weight = pair_row(tables.weight, b, h, r, counts)
    gain = load_gain(tables.gain, b, h, r)
    o_row = (b * n_heads + h).to(tl.int64) * n_rows + first + tl.arange(0, T.BLOCK_M)

    mixed_tables = MixedTables(layout.labels, p_bias, p_weight)
    b_dq = zeros(T.BLOCK_M, T)
    for g in range(0, n_groups if T.GROUPED else 1):
        b_lse = load_lse_log2(p_lse, o_row, n_groups, g, m_m)
        b_factor = tl.full([T.BLOCK_M], gain, tl.float32)
        if tables.gates is not None:
            o_gate = (first + tl.arange(0, T.BLOCK_M)) * tables.gates.stride[1] + g
            b_factor *= tl.load(tables.gates.p + b * tables.gates.stride[0] + o_gate, mask=m_m, other=0.0)
        rows = QueryBlock(b_q, b_dout, b_lse, b_factor)
        b_delta = tl.zeros([T.BLOCK_M], tl.float32)
        first_range = 0
        end_range = n_ranges
        if T.GROUPED:
            first_range = tl.load(layout.order + n_ranges + g)
            end_range = tl.load(layout.order + n_ranges + g + 1)
        else:
            # delta = <dO, o>
            p_out = token_at(out.p, out.stride, b, first, h, T)
            b_out = load_rows(p_out, out.stride[1], m_m, T.BLOCK_M, True, T)
            for d in tl.static_range(T.N_PARTS):
                b_delta += tl.sum(b_dout[d].to(tl.float32) * b_out[d].to(tl.float32), 1)
        for sweep in tl.static_range(0 if T.GROUPED else 1, 2):  # 0: delta, 1: dq
            for position in range(first_range, end_range):
                i = position
                if T.GROUPED:
                    i = tl.load(layout.order + position)
                c = range_segment(i, layout)
                start, n, bias = range_keys(i, c, b, p_key_starts, p_bias, layout, counts, T)
                kv = open_keys_values(inputs, None, None, b, h_kv, c, start, counts, T)
                weight = load_weight(p_weight, c, T)
                b_delta, b_dq = query_sweep(
                    rows,
                    b_delta,
                    b_dq,
                    kv,
                    c,
                    start,
                    n,
                    scale * LOG2E,
                    bias,
                    weight,
                    mixed_tables,
                    sweep == 0,
                    T,
                )
        tl.store(p_delta + o_row * n_groups + g, b_delta, mask=m_m)
    p_dq = token_at(dq.p, dq.stride, b, first, h, T)
    store_rows(p_dq, dq.stride[1], scaled(b_dq, scale, T), m_m, T.BLOCK_M, T)


@triton.jit
def key_tile(
    b_k,
    b_v,
    b_dk,
    b_dv,
    rows,
    m,
    end,
    g,
    pair,
    scale,
    n_groups,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    T: tl.constexpr,
):
    """Rows m .. m + BLOCK_M: add dS^T Q to b_dk and (a P)^T dO to b_dv, both (BLOCK_N, D).

    rows: RowPointers; pair: PairTables; SCALED: the scale differs by head, so it multiplies dS here.
    """
    p_lse = rows.lse + rows.o_head
    p_delta = rows.delta + rows.o_head
    o_m = m + tl.arange(0, T.BLOCK_M)
    m_m = o_m < end
    p_q = rows.q + tl.multiple_of(tl.cast(m, tl.int64) * rows.stride_q, T.ALIGN)
    p_dout = rows.dout + tl.multiple_of(tl.cast(m, tl.int64) * rows.stride_dout, T.ALIGN)
    b_q = load_rows(p_q, rows.stride_q, m_m, T.BLOCK_M, MASKED, T)  # (BLOCK_M, D)
    b_lse = load_lse_log2(p_lse, o_m, n_groups, g, m_m)
    b_p = tl.exp2(row_products(b_k, b_q, T) * (scale * LOG2E) + (pair.bias[:, None] - b_lse[None, :]))
    if MASKED:
        b_p = tl.where(m_m[None, :], b_p, 0.0)  # P^T, (BLOCK_N, BLOCK_M)
    if T.MIXED:
        b_p = tl.where(pair.seen[:, None], b_p, 0.0)
    b_dout = load_rows(p_dout, rows.stride_dout, m_m, T.BLOCK_M, MASKED, T)
    b_a = pair.gain * pair.weight[:, None]  # (BLOCK_N | 1, BLOCK_M | 1)
    if rows.gates is not None:
        b_gate = tl.load(rows.gates + o_m * rows.stride_gates + g, mask=m_m, other=0.0)
        b_a = b_a * b_gate[None, :]
    b_dv = add_product(b_dv, b_p * b_a, b_dout, T)
    # Values of weight 0 may be NaN.
    b_dp = tl.where((pair.weight != 0)[:, None], row_products(b_v, b_dout, T) * b_a, 0.0)
    b_delta = tl.load(p_delta + o_m * n_groups + g, mask=m_m, other=0.0)
    b_ds = b_p * (b_dp - b_delta[None, :])
    if SCALED:
        b_ds *= scale
    return add_product(b_dk, b_ds, b_q, T), b_dv


@triton.jit(do_not_specialize=Counts._fields)
def key_gradient_kernel(
    inputs,  # Inputs; tables.gain (B, H, R) is never None
    dout,  # RowTensor (B, M, H, D)
    dks,  # KeyTensors as inputs.k, but one item for each output item; written
    dvs,
    p_lse,  # (B, H, M, G) float32
    p_delta,  # (B, H, M, G) float32, from query_gradient_kernel
    n_items,
    n_heads,
    n_rows,
    n_keys,
    n_blocks,
    n_row_segments,
    n_key_segments,
    n_ranges,
    n_groups,
    T: tl.constexpr,
):
    """One program per item, key head and key block."""
    counts = Counts(
        n_items, n_heads, n_rows, n_keys, n_blocks, n_row_segments, n_key_segments, n_ranges, n_groups
    )
    q, tables, layout = inputs.q, inputs.tables, inputs.layout
    block = tl.program_id(0) % n_blocks
    n_kv_heads = n_heads // T.HEADS_PER_KV
    b = tl.program_id(0) // n_blocks // n_kv_heads
    h_kv = tl.program_id(0) // n_blocks % n_kv_heads
    p_row_starts = item_starts(layout.row_starts, b)
    own = find_key_block(block, b, layout, counts, T)
    if T.RAGGED:
        if own.first >= own.end:
            return
    o_n = own.first + tl.arange(0, T.BLOCK_N)
    m_n = o_n < own.limit  # (BLOCK_N,)
    b_label, m_label = load_labels(own.c, layout.labels, o_n, m_n, T)

    kv = open_keys_values(inputs, None, None, b, h_kv, own.c, own.start, counts, T)
    b_k = load_keys(kv.k, 0, m_n, True, T)  # (BLOCK_N, D)
    b_v = load_keys(kv.v, 0, m_n, True, T)
    b_dk = zeros(T.BLOCK_N, T)
    b_dv = zeros(T.BLOCK_N, T)
    q_item = query_item(q, b)
    for h in range(h_kv * T.HEADS_PER_KV, (h_kv + 1) * T.HEADS_PER_KV):
        p_q = token_at(q.p, q.stride, q_item, 0, h, T)
        p_dout = token_at(dout.p, dout.stride, b, 0, h, T)
        o_head = tl.cast(b * n_heads + h, tl.int64) * n_rows * n_groups
        p_gates = None
        stride_gates = 0
        if tables.gates is not None:
            p_gates = tables.gates.p + b * tables.gates.stride[0]
            stride_gates = tables.gates.stride[1]
        rows = RowPointers(
            p_q, q.stride[1], p_dout, dout.stride[1], p_lse, p_delta, o_head, p_gates, stride_gates
        )
        scale = inputs.scale
        if tables.scales is not None:
            scale = load_scale(tables.scales, b, h)
        for r in range(0, n_row_segments):
            m = tl.load(p_row_starts + r)  # type: ignore[operator]  # never None in this kernel
            stop = tl.load(p_row_starts + r + 1)  # type: ignore[operator]
            gain = load_gain(tables.gain, b, h, r)
            b_bias, m_seen, any_seen = load_block_bias(tables.bias, b, h, r, b_label, m_label, counts)
            stop = tl.where(any_seen != 0, stop, m)
            b_weight = tl.full(b_label.shape, 1.0, tl.float32)
            if tables.weight is not None:
                p_weight = pair_row(tables.weight, b, h, r, counts)
                b_weight = tl.load(p_weight + b_label, mask=m_label, other=0.0)
            if T.MIXED:
                b_weight = tl.where(m_seen, b_weight, 0.0)
            pair = PairTables(b_bias, b_weight, gain, m_seen)
            full = m + (stop - m) // T.BLOCK_M * T.BLOCK_M
            for j in tl.range(m, full, T.BLOCK_M):
                b_dk, b_dv = key_tile(
                    b_k,
                    b_v,
                    b_dk,
                    b_dv,
                    rows,
                    j,
                    stop,
                    own.g,
                    pair,
                    scale,
                    n_groups,
                    False,
                    tables.scales is not None,
                    T,
                )
            if full < stop:
                b_dk, b_dv = key_tile(
                    b_k,
                    b_v,
                    b_dk,
                    b_dv,
                    rows,
                    full,
                    stop,
                    own.g,
                    pair,
                    scale,
                    n_groups,
                    True,
                    tables.scales is not None,
                    T,
                )
    if tables.scales is None:
        b_dk = scaled(b_dk, inputs.scale, T)
    m_stored = o_n < own.end
    dk = open_range(dks, None, b, h_kv, own.c, own.start, counts, T)
    store_rows(dk.p, dk.stride, masked_rows(b_dk, m_n, T), m_stored, T.BLOCK_N, T)
    dv = open_range(dvs, None, b, h_kv, own.c, own.start, counts, T)
    store_rows(dv.p, dv.stride, masked_rows(b_dv, m_n, T), m_stored, T.BLOCK_N, T)


def query_gradient(
    inputs: Inputs,
    out: RowTensor,
    dout: RowTensor,
    dq: RowTensor,
    lse: Tensor,
    delta: Tensor,
    counts: Counts,
    traits: AttentionTraits,
    tile: TileConfig,
) -> None:
    """Launch query_gradient_kernel; it writes dq, one item for each output item, and delta.

    Args:
        inputs: as in the forward pass, with the total gain in tables.gain and the order of the key ranges.
        out: (B, M, H, D), the forward pass's result.
        dout: (B, M, H, D), its gradient.
        dq: (B, M, H, D), in the dtype of q or float32.
        lse: (B, H, M, G) float32, contiguous.
        delta: as lse.
        counts: sizes; n_blocks are blocks of BLOCK_M rows.
        traits: compile-time constants.
        tile: launch options.
    """
    query_gradient_kernel[(counts.n_blocks * counts.n_items * counts.n_heads,)](
        inputs, out, dout, dq, lse, delta, *counts, T=traits.constants(), **tile.options()
    )


def key_gradient(
    inputs: Inputs,
    dout: RowTensor,
    dks: KeyTensors,
    dvs: KeyTensors,
    lse: Tensor,
    delta: Tensor,
    counts: Counts,
    traits: AttentionTraits,
    tile: TileConfig,
) -> None:
    """Launch key_gradient_kernel after query_gradient; it writes dks and dvs, one item for each output item.

    Args:
        inputs: as in query_gradient, with the groups of the key ranges.
        dout: (B, M, H, D), the gradient of the result.
        dks: as k, in its dtype or float32.
        dvs: as v, in its dtype or float32.
        lse: (B, H, M, G) float32, contiguous.
        delta: from query_gradient.
        counts: sizes; n_blocks are blocks of BLOCK_N keys.
        traits: compile-time constants.
        tile: launch options.
    """
    kv_heads = counts.n_heads // traits.HEADS_PER_KV
    key_gradient_kernel[(counts.n_blocks * counts.n_items * kv_heads,)](
        inputs, dout, dks, dvs, lse, delta, *counts, T=traits.constants(), **tile.options()
    )

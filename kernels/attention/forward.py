"""Segment-controlled attention, forward.

    s_ij = scale * <q_i, k_j> + bias[a(i), c(j)]
    p_ij = softmax over the keys of group(c(j))
    o_i  = gain[a(i)] * sum_g gate_g(i) * sum_{c in g} weight[a(i), c] * sum_{j in c} phi(p_ij) v_j

A program owns one block of rows inside one row segment and walks the key segments: bias, weight and gain are
scalars of a (row block, key segment) pair, only a segment's last tile is masked, and a removed pair has no
tiles. Logits are in log2 units. A tile's exponent is s + log2(weight) and the running max is taken over that
sum, so that P's largest entry is 1; a segment's own row sum, divided by its weight, joins the normaliser when
the segment ends, which is why lse and mass cost nothing in the loop and do not see the weight.

Verified in Triton's interpreter and compiled for sm_80 and sm_90; not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..segments import find_rows
from .blocks import (
    LOG2E,
    Descriptor,
    Traits,
    accumulate,
    added,
    flipped,
    item_strides,
    list_strides,
    load_level,
    load_rows,
    load_weight,
    open_lanes,
    open_pair,
    open_tensor,
    products,
    scaled,
    segment_of,
    store_rows,
    token_at,
    token_strides,
    zeros,
)

LN2 = tl.constexpr(0.6931471805599453)
# Largest |log2(weight)| inside the exponent. Two such weights move the largest logit 60 away from the running
# max, which leaves the sum of the unweighted probabilities 66 binary digits above float32's underflow.
MAX_FOLD = tl.constexpr(30.0)
UNCLIPPED, CLIPPED = tl.constexpr(1), tl.constexpr(2)  # kinds of contrast; 0 is none

# Sizes whose every new value would otherwise compile again.
UNSPECIALIZED = [
    "steps_k",
    "steps_v",
    "stride_tables",
    "stride_starts",
    "n_items",
    "n_heads",
    "n_rows",
    "n_keys",
    "n_row_blocks",
    "n_row_segments",
    "n_key_segments",
    "n_pieces",
    "n_groups",
]


@triton.jit
def pivot(b_max):
    """A finite number to subtract: rows without a logit so far have max -inf"""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def softmax_tile(
    b_q,
    b_max,
    b_sum,
    b_acc,
    keys,
    values,
    j,
    end,
    scale,
    offset,
    VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    T: tl.constexpr,
):
    """One tile of the online softmax; exponents are products * scale + offset"""
    m_n = j + tl.arange(0, T.BLOCK_N) < end
    b_s = products(b_q, keys, j, m_n, MASKED, T)
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_top = tl.maximum(b_max, tl.max(b_s, 1) * scale + offset)
    b_p = tl.exp2(b_s * scale + (offset - pivot(b_top))[:, None])
    if MASKED:
        b_p = tl.where(m_n[None, :], b_p, 0.0)  # -inf * scale is NaN for a scale of 0
    b_decay = tl.exp2(b_max - pivot(b_top))
    b_acc = scaled(b_acc, b_decay[:, None], T)
    if VALUES:
        b_acc = accumulate(b_acc, b_p, values, j, m_n, MASKED, T)
    return b_top, b_sum * b_decay + tl.sum(b_p, 1), b_acc


@triton.jit
def softmax_sweep(
    b_q, b_max, b_sum, b_acc, keys, values, n, scale, offset, VALUES: tl.constexpr, T: tl.constexpr
):
    """The first n keys of a segment: full tiles, then the tail"""
    full = n // T.BLOCK_N * T.BLOCK_N
    for j in tl.range(0, full, T.BLOCK_N, warp_specialize=T.SPECIALIZED):
        b_max, b_sum, b_acc = softmax_tile(
            b_q, b_max, b_sum, b_acc, keys, values, j, n, scale, offset, VALUES, False, T
        )
    if full < n:
        b_max, b_sum, b_acc = softmax_tile(
            b_q, b_max, b_sum, b_acc, keys, values, full, n, scale, offset, VALUES, True, T
        )
    return b_max, b_sum, b_acc


@triton.jit
def lanes_sweep(
    b_q, b_max, b_sum, b_acc, keys, values, start, n, scale, p_labels, p_bias, p_weight, T: tl.constexpr
):
    """The n keys of several short segments from key `start` on. Their weights differ, so that they act on P."""
    for j in tl.range(0, n, T.BLOCK_N):
        o_n = j + tl.arange(0, T.BLOCK_N)
        m_k, m_v, b_bias, b_weight = open_lanes(p_labels, p_bias, p_weight, start + o_n, o_n < n)
        b_s = products(b_q, keys, j, m_k, True, T) * scale + b_bias[None, :]
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.where(m_k[None, :], tl.exp2(b_s - pivot(b_top)[:, None]), 0.0)
        b_decay = tl.exp2(b_max - pivot(b_top))
        b_acc = accumulate(
            scaled(b_acc, b_decay[:, None], T), b_p * b_weight[None, :], values, j, m_v, True, T
        )
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_top
    return b_max, b_sum, b_acc


@triton.jit
def contrast_tile(
    b_q,
    b_lse,
    b_acc,
    keys,
    values,
    j,
    end,
    scale,
    offset,
    weight,
    shift,
    beta,
    low,
    high,
    MASKED: tl.constexpr,
    T: tl.constexpr,
):
    """One tile of the second sweep: clip(beta * p - shift, low, high) with the final normaliser"""
    m_n = j + tl.arange(0, T.BLOCK_N) < end
    b_s = products(b_q, keys, j, m_n, MASKED, T)
    b_p = tl.exp2(b_s * scale + (offset - pivot(b_lse))[:, None]) * beta - shift
    b_p = tl.maximum(b_p, low, propagate_nan=tl.PropagateNan.ALL)
    b_p = tl.minimum(b_p, high, propagate_nan=tl.PropagateNan.ALL) * weight
    if MASKED:
        b_p = tl.where(m_n[None, :], b_p, 0.0)
    return accumulate(b_acc, b_p, values, j, m_n, MASKED, T)


@triton.jit
def contrast_sweep(
    b_q, b_lse, b_acc, keys, values, n, scale, offset, weight, shift, beta, low, high, T: tl.constexpr
):
    full = n // T.BLOCK_N * T.BLOCK_N
    for j in tl.range(0, full, T.BLOCK_N):
        b_acc = contrast_tile(
            b_q, b_lse, b_acc, keys, values, j, n, scale, offset, weight, shift, beta, low, high, False, T
        )
    if full < n:
        b_acc = contrast_tile(
            b_q, b_lse, b_acc, keys, values, full, n, scale, offset, weight, shift, beta, low, high, True, T
        )
    return b_acc


@triton.jit
def fold_weight(weight):
    """(fold, shift) with weight = 2**(fold + shift): fold enters the exponent, the accumulator carries the
    rest.

    shift is 0 but for weights outside 2**-30 .. 2**30. A weight of 0 folds nothing: its values are not read.
    """
    power = tl.maximum(tl.log2(tl.where(weight > 0, weight, 1.0)), -126.0)
    shift = tl.where(power > MAX_FOLD, tl.ceil(power - MAX_FOLD), 0.0)
    shift = tl.where(power < -MAX_FOLD, tl.floor(power + MAX_FOLD), shift)
    return power - shift, shift


@triton.jit
def attend(
    index,
    p_q,
    p_ks,
    p_vs,
    d_k,
    d_v,
    p_out,
    p_lse,
    p_partial,
    p_row_starts,
    p_key_starts,
    p_order,
    p_segments,
    p_labels,
    p_valid,
    p_source_q,
    p_source_k,
    p_source_v,
    p_scales,
    p_bias,
    p_weight,
    p_gain,
    p_gates,
    p_contrast,
    p_value_sums,
    stride_q,
    stride_out,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    steps_k,
    steps_v,
    stride_tables,
    stride_starts,
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
    """What one program owns: row block `index` of all items and heads. The arguments are those of the kernel."""
    block = index % n_row_blocks
    b = index // n_row_blocks // n_heads
    h = index // n_row_blocks % n_heads
    h_kv = h // T.HEADS_PER_KV
    if p_row_starts is not None:
        p_row_starts += b * stride_starts[0]
    if p_key_starts is not None:
        p_key_starts += b * stride_starts[1]
    r, first, end = find_rows(block, p_row_starts, n_row_segments, n_rows, T.BLOCK_M)
    m_m = first + tl.arange(0, T.BLOCK_M) < end

    q_item = tl.cast(b, tl.int64)
    if p_source_q is not None:
        q_item = tl.load(p_source_q + b)
    b_q = load_rows(token_at(p_q, stride_q, q_item, first, h, T), stride_q[1], m_m, T.BLOCK_M, True, T)
    scale = scale * LOG2E
    if p_scales is not None:
        scale = tl.load(p_scales + b * stride_tables[0] + h * stride_tables[1]) * LOG2E
    if T.SIGNED:
        b_q = flipped(b_q, scale, T)
        scale = tl.abs(scale)
    if p_bias is not None:
        p_bias += b * stride_tables[2] + h * stride_tables[3] + r * n_key_segments
    if p_weight is not None:
        p_weight += b * stride_tables[4] + h * stride_tables[5] + r * n_key_segments
    if p_value_sums is not None:
        p_value_sums += tl.cast(b * (n_heads // T.HEADS_PER_KV) + h_kv, tl.int64) * n_key_segments * T.D

    b_out = zeros(T.BLOCK_M, T)
    if T.MASS > 0:
        o_c = tl.arange(0, T.MASS)
        b_mass = tl.zeros([T.MASS], tl.float32)
    for g in range(0, n_groups if T.GROUPED else 1):
        place = 0
        last = n_pieces
        if T.GROUPED:
            place = tl.load(p_order + n_pieces + g)
            last = tl.load(p_order + n_pieces + g + 1)
        if T.RAGGED:
            last = tl.where(first < end, last, place)
        clipped = False
        if T.CLIPPED:
            clipped = tl.load(p_contrast + 4 * g) == CLIPPED

        b_max = tl.full([T.BLOCK_M], float("-inf"), tl.float32)
        b_norm = tl.zeros([T.BLOCK_M], tl.float32)  # sum of 2**(s - b_max), without weights
        b_acc = zeros(T.BLOCK_M, T)
        n_allowed = 0
        if T.MASS > 0:
            b_parts = tl.zeros([T.BLOCK_M, T.MASS], tl.float32)  # b_norm by segment
        if T.UNCLIPPED:
            b_level = zeros(1, T)  # sum over segments of weight times the sum of values
        for place_i in range(place, last):
            i = place_i
            if T.GROUPED:
                i = tl.load(p_order + place_i)
            c = segment_of(i, p_segments)
            start, n, offset = open_pair(i, c, b, p_key_starts, n_keys, n_key_segments, p_valid, p_bias, T)
            keys = open_tensor(
                p_ks, stride_kb, stride_kn, stride_kh, p_source_k, d_k, steps_k, b, h_kv, c, start, n_items, T
            )
            values = open_tensor(
                p_vs, stride_vb, stride_vn, stride_vh, p_source_v, d_v, steps_v, b, h_kv, c, start, n_items, T
            )
            n_allowed += n
            n_mixed = 0
            if T.LANES:
                n_mixed = tl.where(c < 0, n, 0)
                n -= n_mixed
            fold = 0.0
            b_before = b_max
            b_sum = tl.zeros([T.BLOCK_M], tl.float32)
            if T.SILENT:
                silent = clipped
                if p_weight is not None:
                    weight = load_weight(p_weight, c, T)
                    silent = silent | (weight == 0)
                    fold, shift = fold_weight(weight)
                    b_acc = scaled(b_acc, tl.exp2(-shift), T)
                n_read = tl.where(silent, 0, n)
                b_max, b_sum, b_acc = softmax_sweep(
                    b_q, b_max, b_sum, b_acc, keys, values, n_read, scale, offset + fold, True, T
                )
                b_max, b_sum, b_acc = softmax_sweep(
                    b_q, b_max, b_sum, b_acc, keys, values, n - n_read, scale, offset + fold, False, T
                )
                if p_weight is not None:
                    b_acc = scaled(b_acc, tl.exp2(shift), T)
            else:
                b_max, b_sum, b_acc = softmax_sweep(
                    b_q, b_max, b_sum, b_acc, keys, values, n, scale, offset, True, T
                )
            if T.LANES:
                b_max, b_sum, b_acc = lanes_sweep(
                    b_q,
                    b_max,
                    b_sum,
                    b_acc,
                    keys,
                    values,
                    start,
                    n_mixed,
                    scale,
                    p_labels,
                    p_bias,
                    p_weight,
                    T,
                )
            b_decay = tl.exp2(b_before - pivot(b_max))
            b_sum *= tl.exp2(-fold)
            b_norm = b_norm * b_decay + b_sum
            if T.MASS > 0:
                b_parts = b_parts * b_decay[:, None] + tl.where(o_c[None, :] == c, b_sum[:, None], 0.0)
            if T.UNCLIPPED:
                level_weight = tl.where(n > 0, 1.0, 0.0)
                if p_weight is not None:
                    level_weight *= weight
                b_level = added(b_level, load_level(p_value_sums + c * T.D, level_weight, T), T)

        b_share = tl.where(b_norm == 0, 0.0, 1.0 / b_norm)
        b_lse = b_max + tl.log2(b_norm)
        if T.MASS > 0:
            b_mass += tl.sum(b_parts * tl.where(m_m, b_share, 0.0)[:, None], 0)
        if p_lse is not None:
            rows = tl.cast(b * n_heads + h, tl.int64) * n_rows + first
            o_lse = (rows + tl.arange(0, T.BLOCK_M)) * n_groups + g
            tl.store(p_lse + o_lse, b_lse * LN2, mask=m_m)

        if T.CLIPPED:
            if clipped:
                beta = tl.load(p_contrast + 4 * g + 1)
                low = tl.load(p_contrast + 4 * g + 2)
                high = tl.load(p_contrast + 4 * g + 3)
                mean = (beta - 1.0) / tl.maximum(n_allowed, 1).to(tl.float32)
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
                        d_k,
                        steps_k,
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
                        d_v,
                        steps_v,
                        b,
                        h_kv,
                        c,
                        start,
                        n_items,
                        T,
                    )
                    weight = 1.0
                    if p_weight is not None:
                        weight = tl.load(p_weight + c)
                        n = tl.where(weight == 0, 0, n)
                    b_acc = contrast_sweep(
                        b_q, b_lse, b_acc, keys, values, n, scale, offset, weight, mean, beta, low, high, T
                    )
                b_share = tl.full([T.BLOCK_M], 1.0, tl.float32)
        b_acc = scaled(b_acc, b_share[:, None], T)
        if T.UNCLIPPED:
            if tl.load(p_contrast + 4 * g) == UNCLIPPED:
                beta = tl.load(p_contrast + 4 * g + 1)
                mean = (1.0 - beta) / tl.maximum(n_allowed, 1).to(tl.float32)
                b_acc = added(scaled(b_acc, beta, T), scaled(b_level, mean, T), T)
        if p_gates is not None:
            o_gate = (first + tl.arange(0, T.BLOCK_M)) * stride_tables[9] + g
            b_gate = tl.load(p_gates + b * stride_tables[8] + o_gate, mask=m_m, other=0.0)
            b_acc = scaled(b_acc, b_gate[:, None], T)
        b_out = added(b_out, b_acc, T)

    if p_gain is not None:
        b_out = scaled(b_out, tl.load(p_gain + b * stride_tables[6] + h * stride_tables[7] + r), T)
    store_rows(token_at(p_out, stride_out, b, first, h, T), stride_out[1], b_out, m_m, T.BLOCK_M, T)
    if T.MASS > 0:
        p_partial += tl.cast(index, tl.int64) * n_key_segments
        tl.store(p_partial + o_c, b_mass, mask=o_c < n_key_segments)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    p_q,  # (batch, M, H, D)
    p_ks,  # tuple of T.TENSORS: (batch, N, Hkv, D), or (batch, keys of segment c, Hkv, D)
    p_vs,
    d_k,  # descriptor of the only tensor as a matrix of tokens, or None
    d_v,
    p_out,  # (B, M, H, D)
    p_lse,  # (B, H, M, G) float32, or None
    p_partial,  # (B, H, row blocks, C) float32: mass of each row block
    p_row_starts,  # (1|B, R + 1) int32, or None: one segment
    # (1|B, P + 1) int32 starts of the key pieces, or None: one. A piece is a segment but for T.LANES
    p_key_starts,
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
    p_gain,  # (1|B, 1|H, R) float32, or None
    p_gates,  # (1|B, 1|M, G) float32, or None
    p_contrast,  # (G, 4) float32: kind, beta, low, high; or None
    p_value_sums,  # (B, Hkv, C, D) float32: sum of a segment's valid values; or None
    stride_q,  # (item, row, head)
    stride_out,
    stride_kb,  # one per tensor; 0 where a batch of 1 broadcasts
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    steps_k,  # (rows an item, rows a head, columns a head) of d_k
    steps_v,
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
    if T.PERSISTENT:
        for index in tl.range(tl.program_id(0), n_items * n_heads * n_row_blocks, tl.num_programs(0)):
            attend(
                index,
                p_q,
                p_ks,
                p_vs,
                d_k,
                d_v,
                p_out,
                p_lse,
                p_partial,
                p_row_starts,
                p_key_starts,
                p_order,
                p_segments,
                p_labels,
                p_valid,
                p_source_q,
                p_source_k,
                p_source_v,
                p_scales,
                p_bias,
                p_weight,
                p_gain,
                p_gates,
                p_contrast,
                p_value_sums,
                stride_q,
                stride_out,
                stride_kb,
                stride_kn,
                stride_kh,
                stride_vb,
                stride_vn,
                stride_vh,
                steps_k,
                steps_v,
                stride_tables,
                stride_starts,
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
                T,
            )
    else:
        attend(
            tl.program_id(0),
            p_q,
            p_ks,
            p_vs,
            d_k,
            d_v,
            p_out,
            p_lse,
            p_partial,
            p_row_starts,
            p_key_starts,
            p_order,
            p_segments,
            p_labels,
            p_valid,
            p_source_q,
            p_source_k,
            p_source_v,
            p_scales,
            p_bias,
            p_weight,
            p_gain,
            p_gates,
            p_contrast,
            p_value_sums,
            stride_q,
            stride_out,
            stride_kb,
            stride_kn,
            stride_kh,
            stride_vb,
            stride_vn,
            stride_vh,
            steps_k,
            steps_v,
            stride_tables,
            stride_starts,
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
            T,
        )


def attention_forward(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    out: Tensor,
    traits: Traits,
    *,
    warps: int,
    stages: int,
    programs: int | None,
    row_blocks: int,
    row_segments: int = 1,
    key_segments: int = 1,
    pieces: int = 1,
    groups: int = 1,
    scale: float = 1.0,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    gain: Tensor | None = None,
    gates: Tensor | None = None,
    row_starts: Tensor | None = None,
    key_starts: Tensor | None = None,
    order: Tensor | None = None,
    segments: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    source_q: Tensor | None = None,
    source_k: Tensor | None = None,
    source_v: Tensor | None = None,
    contrast: Tensor | None = None,
    value_sums: Tensor | None = None,
    descriptors: tuple[Descriptor, Descriptor] | None = None,
    lse: Tensor | None = None,
    partial: Tensor | None = None,
) -> None:
    """Launch the kernel; it writes out, and lse and partial where they are given.

    Shapes and dtypes are those beside the kernel's pointers. Tables, starts, sources, lse and partial are
    contiguous; q, k, v and out have a contiguous last dimension, and k and v a batch of B, of 1, or what
    their source indexes.
    row_blocks: of an item and head, at least the sum over row segments of ceil(length / BLOCK_M). programs:
        as many walk
    all row blocks, with T.PERSISTENT; None: one for each.
    """
    batch, rows, heads, _ = out.shape
    d_k, d_v = (None, None) if descriptors is None else (d.make(traits) for d in descriptors)
    steps_k, steps_v = ((0, 0, 0),) * 2 if descriptors is None else (d.steps for d in descriptors)
    total = row_blocks * batch * heads
    attention_forward_kernel[(min(programs or total, total),)](
        q,
        tuple(ks),
        tuple(vs),
        d_k,
        d_v,
        out,
        lse,
        partial,
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
        gain,
        gates,
        contrast,
        value_sums,
        stride_q=token_strides(q),
        stride_out=token_strides(out),
        **list_strides("k", ks, source_k),
        **list_strides("v", vs, source_v),
        steps_k=steps_k,
        steps_v=steps_v,
        stride_tables=tuple(s for t in (scales, bias, weight, gain, gates) for s in item_strides(t)),
        stride_starts=(item_strides(row_starts)[0], item_strides(key_starts)[0]),
        scale=scale,
        n_items=batch,
        n_heads=heads,
        n_rows=rows,
        n_keys=ks[0].shape[1],
        n_row_blocks=row_blocks,
        n_row_segments=row_segments,
        n_key_segments=key_segments,
        n_pieces=pieces,
        n_groups=groups,
        T=traits.constants(),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )

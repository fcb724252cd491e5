"""Segment-controlled attention, forward.

    s_ij = scale * <q_i, k_j> + bias[a(i), c(j)]
    p_ij = softmax over the keys of group(c(j))
    o_i  = gain[a(i)] * sum_g gate_g(i) * sum_{c in g} weight[a(i), c] * sum_{j in c} phi(p_ij) v_j

A program owns one block of rows inside one row segment and walks the key segments: bias, weight and gain are scalars
of a (row block, key segment) pair, only a segment's last tile is masked, and a removed pair has no tiles. Logits are in
log2 units. A tile's exponent is s + log2(weight) and the running max is taken over that sum, so that P's largest entry
is 1; a segment's own row sum, divided by its weight, joins the normaliser when the segment ends, which is why lse and
mass cost nothing in the loop and do not see the weight.

Verified in Triton's interpreter and compiled for sm_80 and sm_90; not yet run on hardware.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .segments import dot, find_rows, load_tile, pick, rounded, store_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Largest |log2(weight)| inside the exponent. Two such weights move the largest logit 60 away from the running max,
# which leaves the sum of the unweighted probabilities 66 binary digits above float32's underflow.
MAX_FOLD = tl.constexpr(30.0)
LOWEST = tl.constexpr(-3.0e38)  # a finite bias stays finite in log2 units
UNCLIPPED, CLIPPED = tl.constexpr(1), tl.constexpr(2)  # kinds of contrast; 0 is none

# Sizes whose every new value would otherwise compile again.
UNSPECIALIZED = [
    "stride_tables", "stride_starts", "n_items", "n_heads", "n_rows", "n_keys", "n_row_blocks", "n_row_segments",
    "n_key_segments", "n_groups",
]  # fmt: skip


class Traits(NamedTuple):
    """What a kernel is compiled for; features that it does not name are compiled away."""

    D: tl.constexpr
    D1: tl.constexpr  # the head dim is one tile of D1 columns, or a second one of D2 (0: none)
    D2: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr
    TENSORS: tl.constexpr  # 1: all keys in one tensor; else one per key segment
    HEADS_PER_KV: tl.constexpr
    ALIGN: tl.constexpr  # a power of two that divides every stride
    RAGGED: tl.constexpr  # an item may have fewer row blocks than the grid
    GROUPED: tl.constexpr  # several softmax groups
    SILENT: tl.constexpr  # some tiles count in max and sum, but their values are not read
    UNCLIPPED: tl.constexpr  # some group has a contrast without clip
    CLIPPED: tl.constexpr  # some group has one with clip: a second sweep
    SIGNED: tl.constexpr  # the scale may be negative
    MASS: tl.constexpr  # columns of the mass, a power of two; 0: no mass
    PRECISION: tl.constexpr  # of float32 products
    EMULATE: tl.constexpr  # bfloat16 in the interpreter


@triton.jit
def zeros(T: tl.constexpr):
    if T.D2 > 0:
        return tl.zeros([T.BLOCK_M, T.D1], tl.float32), tl.zeros([T.BLOCK_M, T.D2], tl.float32)
    else:
        return (tl.zeros([T.BLOCK_M, T.D1], tl.float32),)


@triton.jit
def scaled(b_x, factor, T: tl.constexpr):
    if T.D2 > 0:
        return b_x[0] * factor, b_x[1] * factor
    else:
        return (b_x[0] * factor,)


@triton.jit
def added(b_x, b_y, T: tl.constexpr):
    if T.D2 > 0:
        return b_x[0] + b_y[0], b_x[1] + b_y[1]
    else:
        return (b_x[0] + b_y[0],)


@triton.jit
def load_rows(p, stride, m, ROWS: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr):
    """ROWS rows from p on, those outside m as 0: (ROWS, D1) and, if there is one, (ROWS, D2)"""
    if T.D2 > 0:
        return (
            load_tile(p, stride, m, 0, T.D1, T.D, ROWS, T.ALIGN, MASKED),
            load_tile(p, stride, m, T.D1, T.D2, T.D, ROWS, T.ALIGN, MASKED),
        )
    else:
        return (load_tile(p, stride, m, 0, T.D1, T.D, ROWS, T.ALIGN, MASKED),)


@triton.jit
def store_rows(p, stride, b_x, m, T: tl.constexpr):
    store_tile(p, stride, b_x[0], m, 0, T.D1, T.D, T.BLOCK_M, T.ALIGN, T.EMULATE)
    if T.D2 > 0:
        store_tile(p, stride, b_x[1], m, T.D1, T.D2, T.D, T.BLOCK_M, T.ALIGN, T.EMULATE)


@triton.jit
def flipped(b_x, scale, T: tl.constexpr):
    """b_x with the scale's sign, so that the largest product is the largest logit"""
    sign = tl.where(scale < 0, -1.0, 1.0)
    if T.D2 > 0:
        return (b_x[0].to(tl.float32) * sign).to(b_x[0].dtype), (b_x[1].to(tl.float32) * sign).to(b_x[1].dtype)
    else:
        return ((b_x[0].to(tl.float32) * sign).to(b_x[0].dtype),)


@triton.jit
def products(b_q, keys, j, m_n, MASKED: tl.constexpr, T: tl.constexpr):
    """<q_i, k_j> of the tile from key j on, (BLOCK_M, BLOCK_N)"""
    p_k, stride = keys[0], keys[1]
    b_k = load_rows(p_k + tl.multiple_of(tl.cast(j, tl.int64) * stride, T.ALIGN), stride, m_n, T.BLOCK_N, MASKED, T)
    b_s = dot(b_q[0], tl.trans(b_k[0]), None, T.PRECISION, T.EMULATE)
    if T.D2 > 0:
        b_s = dot(b_q[1], tl.trans(b_k[1]), b_s, T.PRECISION, T.EMULATE)
    return b_s


@triton.jit
def accumulate(b_acc, b_p, values, j, m_n, MASKED: tl.constexpr, T: tl.constexpr):
    """b_acc + P V of the tile from key j on"""
    p_v, stride = values[0], values[1]
    b_v = load_rows(p_v + tl.multiple_of(tl.cast(j, tl.int64) * stride, T.ALIGN), stride, m_n, T.BLOCK_N, MASKED, T)
    b_p = rounded(b_p, b_v[0].dtype, T.EMULATE)
    if T.D2 > 0:
        return (
            dot(b_p, b_v[0], b_acc[0], T.PRECISION, T.EMULATE),
            dot(b_p, b_v[1], b_acc[1], T.PRECISION, T.EMULATE),
        )
    else:
        return (dot(b_p, b_v[0], b_acc[0], T.PRECISION, T.EMULATE),)


@triton.jit
def pivot(b_max):
    """A finite number to subtract: rows without a logit so far have max -inf"""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def softmax_tile(b_q, b_max, b_sum, b_acc, keys, values, j, end, scale, offset,
                 VALUES: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr):  # fmt: skip
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
def softmax_sweep(b_q, b_max, b_sum, b_acc, keys, values, n, scale, offset, VALUES: tl.constexpr, T: tl.constexpr):
    """The first n keys of a segment: full tiles, then the tail"""
    full = n // T.BLOCK_N * T.BLOCK_N
    for j in tl.range(0, full, T.BLOCK_N):
        b_max, b_sum, b_acc = softmax_tile(
            b_q, b_max, b_sum, b_acc, keys, values, j, n, scale, offset, VALUES, False, T
        )
    if full < n:
        b_max, b_sum, b_acc = softmax_tile(
            b_q, b_max, b_sum, b_acc, keys, values, full, n, scale, offset, VALUES, True, T
        )
    return b_max, b_sum, b_acc


@triton.jit
def contrast_tile(b_q, b_lse, b_acc, keys, values, j, end, scale, offset, weight, shift, beta, low, high,
                  MASKED: tl.constexpr, T: tl.constexpr):  # fmt: skip
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
def contrast_sweep(b_q, b_lse, b_acc, keys, values, n, scale, offset, weight, shift, beta, low, high, T: tl.constexpr):
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
    """(fold, shift) with weight = 2**(fold + shift): fold enters the exponent, the accumulator carries the rest.

    shift is 0 but for weights outside 2**-30 .. 2**30. A weight of 0 folds nothing: its values are not read.
    """
    power = tl.maximum(tl.log2(tl.where(weight > 0, weight, 1.0)), -126.0)
    shift = tl.where(power > MAX_FOLD, tl.ceil(power - MAX_FOLD), 0.0)
    shift = tl.where(power < -MAX_FOLD, tl.floor(power + MAX_FOLD), shift)
    return power - shift, shift


@triton.jit
def open_tensor(p_xs, stride_b, stride_n, stride_h, p_source, b, h, c, start, n_items, T: tl.constexpr):
    """(pointer to the first token of segment c for one item and head, stride of its tokens)"""
    t = c
    if T.TENSORS == 1:
        t = 0
    if p_source is not None:
        b = tl.load(p_source + t * n_items + b)
    stride = pick(stride_n, t, T.TENSORS)
    x = pick(p_xs, t, T.TENSORS)
    x += tl.multiple_of(tl.cast(b, tl.int64) * pick(stride_b, t, T.TENSORS), T.ALIGN)
    x += tl.multiple_of(tl.cast(h, tl.int64) * pick(stride_h, t, T.TENSORS), T.ALIGN)
    x += tl.multiple_of(tl.cast(start, tl.int64) * stride, T.ALIGN)
    return x, stride


@triton.jit
def open_pair(c, b, p_key_starts, n_keys, n_key_segments, p_valid, p_bias, T: tl.constexpr):
    """(first key in its tensor, keys to read, bias in log2 units) of segment c for this program's rows"""
    start = 0
    n = n_keys
    if p_key_starts is not None:
        start = tl.load(p_key_starts + c)
        n = tl.load(p_key_starts + c + 1) - start
    if T.TENSORS > 1:
        start = 0
    if p_valid is not None:
        n = tl.minimum(n, tl.maximum(tl.load(p_valid + b * n_key_segments + c), 0))
    bias = 0.0
    if p_bias is not None:
        bias = tl.load(p_bias + c)
        n = tl.where(bias == float("-inf"), 0, n)
        bias = tl.maximum(bias * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return start, n, bias


@triton.jit
def zeros_level(T: tl.constexpr):
    if T.D2 > 0:
        return tl.zeros([1, T.D1], tl.float32), tl.zeros([1, T.D2], tl.float32)
    else:
        return (tl.zeros([1, T.D1], tl.float32),)


@triton.jit
def add_level(b_level, p_sums, weight, T: tl.constexpr):
    """b_level + weight * the D sums of values at p_sums; a weight of 0 reads none"""
    o_1 = tl.arange(0, T.D1)[None, :]
    b_1 = b_level[0] + weight * tl.load(p_sums + o_1, mask=(o_1 < T.D) & (weight != 0), other=0.0)
    if T.D2 > 0:
        o_2 = T.D1 + tl.arange(0, T.D2)[None, :]
        return b_1, b_level[1] + weight * tl.load(p_sums + o_2, mask=(o_2 < T.D) & (weight != 0), other=0.0)
    else:
        return (b_1,)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    p_q,  # (batch, M, H, D)
    p_ks,  # tuple of T.TENSORS: (batch, N, Hkv, D), or (batch, keys of segment c, Hkv, D)
    p_vs,
    p_out,  # (B, M, H, D)
    p_lse,  # (B, H, M, G) float32, or None
    p_partial,  # (B, H, row blocks, C) float32: mass of each row block
    p_row_starts,  # (1|B, R + 1) int32, or None: one segment
    p_key_starts,  # (1|B, C + 1) int32, or None: one segment
    p_order,  # (C + G + 1,) int32: the key segments sorted by group, then each group's first place; or None: one group
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
    n_groups,
    T: tl.constexpr,
):
    block = tl.program_id(0) % n_row_blocks
    b = tl.program_id(0) // n_row_blocks // n_heads
    h = tl.program_id(0) // n_row_blocks % n_heads
    h_kv = h // T.HEADS_PER_KV
    if p_row_starts is not None:
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
    p_q += tl.multiple_of(q_item * stride_q[0], T.ALIGN)
    p_q += tl.multiple_of(tl.cast(first, tl.int64) * stride_q[1], T.ALIGN)
    p_q += tl.multiple_of(h.to(tl.int64) * stride_q[2], T.ALIGN)
    b_q = load_rows(p_q, stride_q[1], m_m, T.BLOCK_M, True, T)
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
        p_value_sums += (b * (n_heads // T.HEADS_PER_KV) + h_kv).to(tl.int64) * n_key_segments * T.D

    b_out = zeros(T)
    if T.MASS > 0:
        o_c = tl.arange(0, T.MASS)
        b_mass = tl.zeros([T.MASS], tl.float32)
    for g in range(0, n_groups if T.GROUPED else 1):
        place = 0
        last = n_key_segments
        if p_key_starts is None:
            last = 1
        if T.GROUPED:
            place = tl.load(p_order + n_key_segments + g)
            last = tl.load(p_order + n_key_segments + g + 1)
        clipped = False
        if T.CLIPPED:
            clipped = tl.load(p_contrast + 4 * g) == CLIPPED

        b_max = tl.full([T.BLOCK_M], float("-inf"), tl.float32)
        b_norm = tl.zeros([T.BLOCK_M], tl.float32)  # sum of 2**(s - b_max), without weights
        b_acc = zeros(T)
        n_allowed = 0
        if T.MASS > 0:
            b_parts = tl.zeros([T.BLOCK_M, T.MASS], tl.float32)  # b_norm by segment
        if T.UNCLIPPED:
            b_level = zeros_level(T)  # sum over segments of weight times the sum of values
        for i in range(place, last):
            c = i
            if T.GROUPED:
                c = tl.load(p_order + i)
            start, n, offset = open_pair(c, b, p_key_starts, n_keys, n_key_segments, p_valid, p_bias, T)
            keys = open_tensor(p_ks, stride_kb, stride_kn, stride_kh, p_source_k, b, h_kv, c, start, n_items, T)
            values = open_tensor(p_vs, stride_vb, stride_vn, stride_vh, p_source_v, b, h_kv, c, start, n_items, T)
            n_allowed += n
            fold = 0.0
            b_before = b_max
            b_sum = tl.zeros([T.BLOCK_M], tl.float32)
            if T.SILENT:
                silent = clipped
                if p_weight is not None:
                    weight = tl.load(p_weight + c)
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
            b_decay = tl.exp2(b_before - pivot(b_max))
            b_sum *= tl.exp2(-fold)
            b_norm = b_norm * b_decay + b_sum
            if T.MASS > 0:
                b_parts = b_parts * b_decay[:, None] + tl.where(o_c[None, :] == c, b_sum[:, None], 0.0)
            if T.UNCLIPPED:
                level_weight = tl.where(n > 0, 1.0, 0.0)
                if p_weight is not None:
                    level_weight *= weight
                b_level = add_level(b_level, p_value_sums + c * T.D, level_weight, T)

        b_share = tl.where(b_norm == 0, 0.0, 1.0 / b_norm)
        b_lse = b_max + tl.log2(b_norm)
        if T.MASS > 0:
            b_mass += tl.sum(b_parts * tl.where(m_m, b_share, 0.0)[:, None], 0)
        if p_lse is not None:
            rows = (b * n_heads + h).to(tl.int64) * n_rows + first
            o_lse = (rows + tl.arange(0, T.BLOCK_M)) * n_groups + g
            tl.store(p_lse + o_lse, b_lse * LN2, mask=m_m)

        if T.CLIPPED:
            if clipped:
                beta = tl.load(p_contrast + 4 * g + 1)
                low = tl.load(p_contrast + 4 * g + 2)
                high = tl.load(p_contrast + 4 * g + 3)
                mean = (beta - 1.0) / tl.maximum(n_allowed, 1).to(tl.float32)
                for i in range(place, last):
                    c = i
                    if T.GROUPED:
                        c = tl.load(p_order + i)
                    start, n, offset = open_pair(c, b, p_key_starts, n_keys, n_key_segments, p_valid, p_bias, T)
                    keys = open_tensor(
                        p_ks, stride_kb, stride_kn, stride_kh, p_source_k, b, h_kv, c, start, n_items, T
                    )
                    values = open_tensor(
                        p_vs, stride_vb, stride_vn, stride_vh, p_source_v, b, h_kv, c, start, n_items, T
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
    p_out += tl.multiple_of(b.to(tl.int64) * stride_out[0], T.ALIGN)
    p_out += tl.multiple_of(tl.cast(first, tl.int64) * stride_out[1], T.ALIGN)
    p_out += tl.multiple_of(h.to(tl.int64) * stride_out[2], T.ALIGN)
    store_rows(p_out, stride_out[1], b_out, m_m, T)
    if T.MASS > 0:
        p_partial += (tl.program_id(0).to(tl.int64)) * n_key_segments
        tl.store(p_partial + o_c, b_mass, mask=o_c < n_key_segments)


def attention_forward(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    out: Tensor,
    traits: Traits,
    *,
    warps: int,
    stages: int,
    row_blocks: int,
    row_segments: int = 1,
    key_segments: int = 1,
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
    valid: Tensor | None = None,
    source_q: Tensor | None = None,
    source_k: Tensor | None = None,
    source_v: Tensor | None = None,
    contrast: Tensor | None = None,
    value_sums: Tensor | None = None,
    lse: Tensor | None = None,
    partial: Tensor | None = None,
) -> None:
    """Launch the kernel; it writes out, and lse and partial where they are given.

    Shapes and dtypes are those beside the kernel's pointers. Tables, starts, sources, lse and partial are contiguous;
    q, k, v and out have a contiguous last dimension, and k and v a batch of B, of 1, or what their source indexes.
    row_blocks: programs per item and head, at least the sum over row segments of ceil(length / BLOCK_M).
    """
    batch, rows, heads, _ = out.shape

    def items(tensors: Sequence[Tensor], source: Tensor | None) -> tuple[int, ...]:
        return tuple(t.stride(0) if source is not None or t.shape[0] > 1 else 0 for t in tensors)

    attention_forward_kernel[(row_blocks * batch * heads,)](
        q, tuple(ks), tuple(vs), out, lse, partial, row_starts, key_starts, order, valid, source_q, source_k, source_v,
        scales, bias, weight, gain, gates, contrast, value_sums,
        stride_q=(q.stride(0), q.stride(1), q.stride(2)),
        stride_out=(out.stride(0), out.stride(1), out.stride(2)),
        stride_kb=items(ks, source_k),
        stride_kn=tuple(t.stride(1) for t in ks),
        stride_kh=tuple(t.stride(2) for t in ks),
        stride_vb=items(vs, source_v),
        stride_vn=tuple(t.stride(1) for t in vs),
        stride_vh=tuple(t.stride(2) for t in vs),
        stride_tables=tuple(s for t in (scales, bias, weight, gain, gates) for s in item_strides(t)),
        stride_starts=(item_strides(row_starts)[0], item_strides(key_starts)[0]),
        scale=scale, n_items=batch, n_heads=heads, n_rows=rows, n_keys=ks[0].shape[1], n_row_blocks=row_blocks,
        n_row_segments=row_segments, n_key_segments=key_segments, n_groups=groups,
        T=traits, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


def item_strides(t: Tensor | None) -> tuple[int, int]:
    """Strides of the first two dimensions, 0 where one is broadcast."""
    if t is None:
        return 0, 0
    return t.stride(0) * (t.shape[0] > 1), t.stride(1) * (t.shape[1] > 1)


def alignment(tensors: Sequence[Tensor]) -> int:
    """The largest power of two, up to 16, that divides the strides of every item, token and head."""
    common = 16
    for t in tensors:
        for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True):
            common = math.gcd(common, stride) if size > 1 else common
    return common

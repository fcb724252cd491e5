"""Segment-controlled attention, forward.

    s_ij = scale * <q_i, k_j> + bias[a(i), c(j)]              a(i): the row's segment, c(j): the key's segment
    p_ij = softmax over the keys of group(c(j))
    o_i  = gain[a(i)] * sum_g gate_g(i) * sum_{c in g} weight[a(i), c] * sum_{j in c} phi(p_ij) v_j

A program owns one block of rows inside one row segment and walks the key ranges with an online softmax. Bias,
weight and gain are scalars of a (row block, key segment) pair; only the last tile of a range is masked; a
removed pair has no tiles. Logits are in log2 units: p = 2**(s * log2(e) - max).

Where the control enters, in the order of the code:

* bias: range_keys() reads it, softmax_tile() adds it to the logits.
* weight: split_log2() turns it into an exponent that softmax_tile() adds to the logits before the running max
  is taken, so that P's largest entry is 1. The row sum of the segment, divided by the weight again, joins the
  normaliser: the weight acts on P V alone. A mixed range holds keys of several weights: mixed_sweep()
  multiplies P. A weight of 0 skips P V.
* contrast: LINEAR (without clip) after the sweep of a group, from the sums of the segments' values; CLIPPED
  in a second sweep with the final normaliser.
* gates: at the end of each group. gain: before the store.
* mass: b_segment_norm sums P by key segment; each program writes the sum over its rows to partial_mass.

Verified in Triton's interpreter and compiled for sm_80, sm_90 and sm_120; not yet run on hardware.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..segments import find_rows
from .arguments import Counts, Inputs, MatrixDescriptor, Outputs
from .blocks import (
    LOG2E,
    MixedTables,
    TokenMatrix,
    add_product,
    added,
    item_starts,
    load_gain,
    load_keys,
    load_mixed,
    load_rows,
    load_scale,
    load_value_sum,
    load_weight,
    open_keys_values,
    pair_row,
    query_item,
    range_keys,
    range_segment,
    row_products,
    scaled,
    store_rows,
    token_at,
    with_sign_of,
    zeros,
)
from .tiles import TileConfig
from .traits import AttentionTraits

LN2 = tl.constexpr(0.6931471805599453)
# Largest |log2(weight)| inside the exponent. Two such weights move the largest logit 60 away from the running
# max, which leaves the sum of the unweighted probabilities 66 binary digits above float32's underflow.
MAX_EXPONENT = tl.constexpr(30.0)
LINEAR, CLIPPED = tl.constexpr(1), tl.constexpr(2)  # kinds of contrast; 0: none


class Clip(NamedTuple):
    """phi(p) = clip(beta * p - shift, low, high)"""

    beta: float
    shift: float  # (beta - 1) / Nk, Nk keys in the group
    low: float
    high: float


@triton.jit
def finite_max(b_max):
    """The running max as a number to subtract: 0 for rows without a logit so far, whose max is -inf."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def softmax_tile(
    b_q,
    b_max,
    b_sum,
    b_acc,
    kv,
    j,
    end,
    scale,
    bias,
    WITH_PV: tl.constexpr,
    MASKED: tl.constexpr,
    T: tl.constexpr,
):
    """Online softmax over keys j .. j + BLOCK_N; logits are <q, k> * scale + bias.

    b_max: (BLOCK_M,) running max; b_sum: (BLOCK_M,) row sum of this range so far; b_acc: (BLOCK_M, D) sum of
    P V.
    """
    m_n = j + tl.arange(0, T.BLOCK_N) < end  # (BLOCK_N,)
    b_s = row_products(b_q, load_keys(kv.k, j, m_n, MASKED, T), T)  # (BLOCK_M, BLOCK_N)
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale + bias)
    b_p = tl.exp2(b_s * scale + (bias - finite_max(b_new_max))[:, None])
    if MASKED:
        b_p = tl.where(m_n[None, :], b_p, 0.0)  # -inf * scale is NaN for a scale of 0
    b_rescale = tl.exp2(b_max - finite_max(b_new_max))  # (BLOCK_M,)
    b_acc = scaled(b_acc, b_rescale[:, None], T)
    if WITH_PV:
        b_acc = add_product(b_acc, b_p, load_keys(kv.v, j, m_n, MASKED, T), T)
    return b_new_max, b_sum * b_rescale + tl.sum(b_p, 1), b_acc


@triton.jit
def softmax_sweep(b_q, b_max, b_sum, b_acc, kv, n, scale, bias, WITH_PV: tl.constexpr, T: tl.constexpr):
    """softmax_tile over the first n keys of a range: full tiles, then the masked tail."""
    full = n // T.BLOCK_N * T.BLOCK_N
    for j in tl.range(0, full, T.BLOCK_N):
        b_max, b_sum, b_acc = softmax_tile(b_q, b_max, b_sum, b_acc, kv, j, n, scale, bias, WITH_PV, False, T)
    if full < n:
        b_max, b_sum, b_acc = softmax_tile(
            b_q, b_max, b_sum, b_acc, kv, full, n, scale, bias, WITH_PV, True, T
        )
    return b_max, b_sum, b_acc


@triton.jit
def mixed_sweep(b_q, b_max, b_sum, b_acc, kv, start, n, scale, tables, T: tl.constexpr):
    """Online softmax over the n keys of a mixed range from key `start` on; their weights multiply P."""
    for j in tl.range(0, n, T.BLOCK_N):
        o_n = j + tl.arange(0, T.BLOCK_N)
        m_k, m_v, b_bias, b_weight = load_mixed(tables, start + o_n, o_n < n)
        b_k = load_keys(kv.k, j, m_k, True, T)  # (BLOCK_N, D)
        b_s = row_products(b_q, b_k, T) * scale + b_bias[None, :]  # (BLOCK_M, BLOCK_N)
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.where(m_k[None, :], tl.exp2(b_s - finite_max(b_new_max)[:, None]), 0.0)
        b_rescale = tl.exp2(b_max - finite_max(b_new_max))
        b_acc = scaled(b_acc, b_rescale[:, None], T)
        b_acc = add_product(b_acc, b_p * b_weight[None, :], load_keys(kv.v, j, m_v, True, T), T)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_max = b_new_max
    return b_max, b_sum, b_acc


@triton.jit
def clipped_tile(
    b_q, b_lse, b_acc, kv, j, end, scale, bias, weight, clip, MASKED: tl.constexpr, T: tl.constexpr
):
    """b_acc + weight * phi(P) V over keys j .. j + BLOCK_N; b_lse: (BLOCK_M,) of the group in log2 units."""
    m_n = j + tl.arange(0, T.BLOCK_N) < end
    b_s = row_products(b_q, load_keys(kv.k, j, m_n, MASKED, T), T)  # (BLOCK_M, BLOCK_N)
    b_p = tl.exp2(b_s * scale + (bias - finite_max(b_lse))[:, None]) * clip.beta - clip.shift
    b_p = tl.maximum(b_p, clip.low, propagate_nan=tl.PropagateNan.ALL)
    b_p = tl.minimum(b_p, clip.high, propagate_nan=tl.PropagateNan.ALL) * weight
    if MASKED:
        b_p = tl.where(m_n[None, :], b_p, 0.0)
    return add_product(b_acc, b_p, load_keys(kv.v, j, m_n, MASKED, T), T)


@triton.jit
def clipped_sweep(b_q, b_lse, b_acc, kv, n, scale, bias, weight, clip, T: tl.constexpr):
    """clipped_tile over the first n keys of a range."""
    full = n // T.BLOCK_N * T.BLOCK_N
    for j in tl.range(0, full, T.BLOCK_N):
        b_acc = clipped_tile(b_q, b_lse, b_acc, kv, j, n, scale, bias, weight, clip, False, T)
    if full < n:
        b_acc = clipped_tile(b_q, b_lse, b_acc, kv, full, n, scale, bias, weight, clip, True, T)
    return b_acc


@triton.jit
def split_log2(weight):
    """(exponent, excess) with weight = 2**(exponent + excess).

    The exponent joins the logits; the excess, 0 for weights in 2**-30 .. 2**30, scales the accumulator. A
    weight of 0 gives (0, 0): its values are not read.
    """
    power = tl.maximum(tl.log2(tl.where(weight > 0, weight, 1.0)), -126.0)
    excess = tl.where(power > MAX_EXPONENT, tl.ceil(power - MAX_EXPONENT), 0.0)
    excess = tl.where(power < -MAX_EXPONENT, tl.floor(power + MAX_EXPONENT), excess)
    return power - excess, excess


@triton.jit(do_not_specialize=Counts._fields)
def attention_forward_kernel(
    inputs,  # Inputs
    outputs,  # Outputs
    k_descriptor,  # tensor descriptors of the only key and value tensor with T.DESCRIPTORS, else None
    v_descriptor,
    descriptor_steps,  # of k and of v: MatrixDescriptor.steps
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
    k_matrix = TokenMatrix(k_descriptor, descriptor_steps[0])
    v_matrix = TokenMatrix(v_descriptor, descriptor_steps[1])

    # This program's rows: first .. end of row segment r.
    block = tl.program_id(0) % n_blocks
    b = tl.program_id(0) // n_blocks // n_heads
    h = tl.program_id(0) // n_blocks % n_heads
    h_kv = h // T.HEADS_PER_KV
    p_row_starts = item_starts(layout.row_starts, b)
    p_key_starts = item_starts(layout.key_starts, b)
    r, first, end = find_rows(block, p_row_starts, n_row_segments, n_rows, T.BLOCK_M)
    m_m = first + tl.arange(0, T.BLOCK_M) < end  # (BLOCK_M,)

    p_q = token_at(q.p, q.stride, query_item(q, b), first, h, T)
    b_q = load_rows(p_q, q.stride[1], m_m, T.BLOCK_M, True, T)  # (BLOCK_M, D)
    scale = inputs.scale * LOG2E
    if tables.scales is not None:
        scale = load_scale(tables.scales, b, h) * LOG2E
    if T.NEGATIVE_SCALE:
        b_q = with_sign_of(b_q, scale, T)
        scale = tl.abs(scale)
    p_bias = pair_row(tables.bias, b, h, r, counts)
    p_weight = pair_row(tables.weight, b, h, r, counts)
    if T.LINEAR_CONTRAST:
        o_head = tl.cast(b * (n_heads // T.HEADS_PER_KV) + h_kv, tl.int64)
        p_value_sums = inputs.contrast.value_sums + o_head * n_key_segments * T.D  # (C, D)

    b_out = zeros(T.BLOCK_M, T)  # (BLOCK_M, D)
    if T.MASS_WIDTH > 0:
        o_c = tl.arange(0, T.MASS_WIDTH)
        b_mass = tl.zeros([T.MASS_WIDTH], tl.float32)
    for g in range(0, n_groups if T.GROUPED else 1):
        # The group's key ranges: first_range .. end_range of layout.order.
        first_range = 0
        end_range = n_ranges
        if T.GROUPED:
            first_range = tl.load(layout.order + n_ranges + g)
            end_range = tl.load(layout.order + n_ranges + g + 1)
        if T.RAGGED:
            end_range = tl.where(first < end, end_range, first_range)
        clipped = False
        if T.CLIPPED_CONTRAST:
            clipped = tl.load(inputs.contrast.rules + 4 * g) == CLIPPED

        b_max = tl.full([T.BLOCK_M], float("-inf"), tl.float32)  # running max of the exponents
        b_norm = tl.zeros([T.BLOCK_M], tl.float32)  # running sum of 2**(s - b_max), without weights
        b_acc = zeros(T.BLOCK_M, T)  # running sum of weight * P V, (BLOCK_M, D)
        n_allowed = 0  # keys of the group that the rows see
        if T.MASS_WIDTH > 0:
            b_segment_norm = tl.zeros([T.BLOCK_M, T.MASS_WIDTH], tl.float32)  # b_norm by key segment
        if T.LINEAR_CONTRAST:
            b_value_sum = zeros(1, T)  # sum of weight * v over the group's keys, (1, D)
        for position in range(first_range, end_range):
            i = position
            if T.GROUPED:
                i = tl.load(layout.order + position)
            c = range_segment(i, layout)
            start, n, bias = range_keys(i, c, b, p_key_starts, p_bias, layout, counts, T)
            kv = open_keys_values(inputs, k_matrix, v_matrix, b, h_kv, c, start, counts, T)
            n_allowed += n
            n_mixed = 0
            if T.MIXED:
                n_mixed = tl.where(c < 0, n, 0)
                n -= n_mixed
            exponent = 0.0  # log2(weight) inside the logits
            b_old_max = b_max
            b_sum = tl.zeros([T.BLOCK_M], tl.float32)
            if T.SKIP_PV:
                skip_pv = clipped
                if p_weight is not None:
                    weight = load_weight(p_weight, c, T)
                    skip_pv = skip_pv | (weight == 0)
                    exponent, excess = split_log2(weight)
                    b_acc = scaled(b_acc, tl.exp2(-excess), T)
                n_read = tl.where(skip_pv, 0, n)
                b_max, b_sum, b_acc = softmax_sweep(
                    b_q, b_max, b_sum, b_acc, kv, n_read, scale, bias + exponent, True, T
                )
                b_max, b_sum, b_acc = softmax_sweep(
                    b_q, b_max, b_sum, b_acc, kv, n - n_read, scale, bias + exponent, False, T
                )
                if p_weight is not None:
                    b_acc = scaled(b_acc, tl.exp2(excess), T)
            else:
                b_max, b_sum, b_acc = softmax_sweep(b_q, b_max, b_sum, b_acc, kv, n, scale, bias, True, T)
            if T.MIXED:
                mixed_tables = MixedTables(layout.labels, p_bias, p_weight)
                b_max, b_sum, b_acc = mixed_sweep(
                    b_q, b_max, b_sum, b_acc, kv, start, n_mixed, scale, mixed_tables, T
                )
            b_rescale = tl.exp2(b_old_max - finite_max(b_max))
            b_sum *= tl.exp2(-exponent)  # row sum without the weight
            b_norm = b_norm * b_rescale + b_sum
            if T.MASS_WIDTH > 0:
                b_segment_norm = b_segment_norm * b_rescale[:, None] + tl.where(
                    o_c[None, :] == c, b_sum[:, None], 0.0
                )  # (BLOCK_M, MASS_WIDTH)
            if T.LINEAR_CONTRAST:
                factor = tl.where(n > 0, 1.0, 0.0)
                if p_weight is not None:
                    factor *= weight
                b_value_sum = added(b_value_sum, load_value_sum(p_value_sums + c * T.D, factor, T), T)

        b_inverse_norm = tl.where(b_norm == 0, 0.0, 1.0 / b_norm)
        b_lse = b_max + tl.log2(b_norm)  # log2 units
        if T.MASS_WIDTH > 0:
            b_mass += tl.sum(b_segment_norm * tl.where(m_m, b_inverse_norm, 0.0)[:, None], 0)
        if outputs.lse is not None:
            o_row = tl.cast(b * n_heads + h, tl.int64) * n_rows + first
            o_lse = (o_row + tl.arange(0, T.BLOCK_M)) * n_groups + g
            tl.store(outputs.lse + o_lse, b_lse * LN2, mask=m_m)

        if T.CLIPPED_CONTRAST:
            # phi(p) = clip(beta * p - (beta - 1) / Nk, low, high): a second sweep, with the final lse.
            if clipped:
                p_rule = inputs.contrast.rules + 4 * g
                beta = tl.load(p_rule + 1)
                low = tl.load(p_rule + 2)
                high = tl.load(p_rule + 3)
                clip = Clip(beta, (beta - 1.0) / tl.maximum(n_allowed, 1).to(tl.float32), low, high)
                for position in range(first_range, end_range):
                    i = position
                    if T.GROUPED:
                        i = tl.load(layout.order + position)
                    c = range_segment(i, layout)
                    start, n, bias = range_keys(i, c, b, p_key_starts, p_bias, layout, counts, T)
                    kv = open_keys_values(inputs, k_matrix, v_matrix, b, h_kv, c, start, counts, T)
                    weight = 1.0
                    if p_weight is not None:
                        weight = tl.load(p_weight + c)
                        n = tl.where(weight == 0, 0, n)
                    b_acc = clipped_sweep(b_q, b_lse, b_acc, kv, n, scale, bias, weight, clip, T)
                b_inverse_norm = tl.full([T.BLOCK_M], 1.0, tl.float32)
        b_acc = scaled(b_acc, b_inverse_norm[:, None], T)
        if T.LINEAR_CONTRAST:
            # phi(p) = beta * p + (1 - beta) / Nk
            p_rule = inputs.contrast.rules + 4 * g
            if tl.load(p_rule) == LINEAR:
                beta = tl.load(p_rule + 1)
                mean = (1.0 - beta) / tl.maximum(n_allowed, 1).to(tl.float32)
                b_acc = added(scaled(b_acc, beta, T), scaled(b_value_sum, mean, T), T)
        if tables.gates is not None:
            o_gate = (first + tl.arange(0, T.BLOCK_M)) * tables.gates.stride[1] + g
            b_gate = tl.load(tables.gates.p + b * tables.gates.stride[0] + o_gate, mask=m_m, other=0.0)
            b_acc = scaled(b_acc, b_gate[:, None], T)
        b_out = added(b_out, b_acc, T)

    if tables.gain is not None:
        b_out = scaled(b_out, load_gain(tables.gain, b, h, r), T)
    out = outputs.out
    store_rows(token_at(out.p, out.stride, b, first, h, T), out.stride[1], b_out, m_m, T.BLOCK_M, T)
    if T.MASS_WIDTH > 0:
        p_mass = outputs.partial_mass + tl.cast(tl.program_id(0), tl.int64) * n_key_segments
        tl.store(p_mass + o_c, b_mass, mask=o_c < n_key_segments)


def attention_forward(
    inputs: Inputs,
    outputs: Outputs,
    counts: Counts,
    traits: AttentionTraits,
    tile: TileConfig,
    descriptors: tuple[MatrixDescriptor, MatrixDescriptor] | None = None,
) -> None:
    """Launch the kernel; it writes the outputs.

    Args:
        inputs: q, k, v and the control; k and v have a batch of B, of 1, or what their source indexes.
        outputs: where the results go.
        counts: sizes; n_blocks are blocks of BLOCK_M rows.
        traits: compile-time constants.
        tile: launch options.
        descriptors: matrices of the only key and value tensor, with traits.DESCRIPTORS.
    """
    k_descriptor, v_descriptor = (
        (None, None) if descriptors is None else (d.make(traits) for d in descriptors)
    )
    steps = ((0, 0, 0),) * 2 if descriptors is None else tuple(d.steps for d in descriptors)
    attention_forward_kernel[(counts.n_blocks * counts.n_items * counts.n_heads,)](
        inputs,
        outputs,
        k_descriptor,
        v_descriptor,
        steps,
        *counts,
        T=traits.constants(),
        **tile.options(),
    )

"""Column mass of the attention map: sum_i p_ij over the rows i of some segments, for every key j.

    p_ij = exp(scale * <q_i, k_j> + bias[a(i), c(j)] - lse_i)

A program owns a block of keys and walks the row segments: every sum has one owner and one order.

Verified in Triton's interpreter and compiled for sm_80, sm_90 and sm_120; not yet run on hardware.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arguments import Counts, Inputs
from .blocks import (
    LOG2E,
    find_key_block,
    item_starts,
    load_block_bias,
    load_keys,
    load_labels,
    load_lse_log2,
    load_rows,
    load_scale,
    open_range,
    query_item,
    row_products,
    token_at,
)
from .tiles import TileConfig
from .traits import AttentionTraits


class QueryPointers(NamedTuple):
    """Pointers to row 0 of one head."""

    q: tl.tensor
    stride_q: tl.tensor
    lse: tl.tensor


@triton.jit
def mass_tile(
    b_mass, b_k, rows, m, end, g, scale, b_bias, m_seen, n_groups, MASKED: tl.constexpr, T: tl.constexpr
):
    """b_mass (BLOCK_N,) + sum of p over rows m .. m + BLOCK_M; rows: QueryPointers."""
    o_m = m + tl.arange(0, T.BLOCK_M)
    m_m = o_m < end
    p_q = rows.q + tl.multiple_of(tl.cast(m, tl.int64) * rows.stride_q, T.ALIGN)
    b_q = load_rows(p_q, rows.stride_q, m_m, T.BLOCK_M, MASKED, T)  # (BLOCK_M, D)
    b_lse = load_lse_log2(rows.lse, o_m, n_groups, g, m_m)
    b_s = row_products(b_k, b_q, T) * scale  # (BLOCK_N, BLOCK_M)
    b_p = tl.exp2(b_s + (b_bias[:, None] - b_lse[None, :]))
    if MASKED:
        b_p = tl.where(m_m[None, :], b_p, 0.0)
    if T.MIXED:
        b_p = tl.where(m_seen[:, None], b_p, 0.0)
    return b_mass + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=Counts._fields)
def column_mass_kernel(
    inputs,  # Inputs
    p_mass,  # (B, H, N) float32, written
    p_lse,  # (B, H, M, G) float32
    p_counted,  # (R,) int32: 1 for the row segments that count
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
    """One program per item, head and key block."""
    counts = Counts(
        n_items, n_heads, n_rows, n_keys, n_blocks, n_row_segments, n_key_segments, n_ranges, n_groups
    )
    q, tables, layout = inputs.q, inputs.tables, inputs.layout
    block = tl.program_id(0) % n_blocks
    b = tl.program_id(0) // n_blocks // n_heads
    h = tl.program_id(0) // n_blocks % n_heads
    p_row_starts = item_starts(layout.row_starts, b)
    own = find_key_block(block, b, layout, counts, T)
    if T.RAGGED:
        if own.first >= own.end:
            return
    o_n = own.first + tl.arange(0, T.BLOCK_N)
    m_n = o_n < own.limit  # (BLOCK_N,)
    b_label, m_label = load_labels(own.c, layout.labels, o_n, m_n, T)
    h_kv = h // T.HEADS_PER_KV
    keys = open_range(inputs.k, None, b, h_kv, own.c, own.start, counts, T)
    b_k = load_keys(keys, 0, m_n, True, T)  # (BLOCK_N, D)
    p_q = token_at(q.p, q.stride, query_item(q, b), 0, h, T)
    head = (b * n_heads + h).to(tl.int64)
    rows = QueryPointers(p_q, q.stride[1], p_lse + head * n_rows * n_groups)
    scale = inputs.scale * LOG2E
    if tables.scales is not None:
        scale = load_scale(tables.scales, b, h) * LOG2E

    b_mass = tl.zeros([T.BLOCK_N], tl.float32)
    for r in range(0, n_row_segments):
        m = tl.load(p_row_starts + r)  # type: ignore[operator]  # never None in this kernel
        stop = tl.load(p_row_starts + r + 1)  # type: ignore[operator]
        b_bias, m_seen, any_seen = load_block_bias(tables.bias, b, h, r, b_label, m_label, counts)
        stop = tl.where((any_seen != 0) & (tl.load(p_counted + r) != 0), stop, m)
        full = m + (stop - m) // T.BLOCK_M * T.BLOCK_M
        for j in tl.range(m, full, T.BLOCK_M):
            b_mass = mass_tile(b_mass, b_k, rows, j, stop, own.g, scale, b_bias, m_seen, n_groups, False, T)
        if full < stop:
            b_mass = mass_tile(b_mass, b_k, rows, full, stop, own.g, scale, b_bias, m_seen, n_groups, True, T)
    tl.store(p_mass + head * n_keys + o_n, tl.where(m_n, b_mass, 0.0), mask=o_n < own.end)


def column_mass(
    inputs: Inputs,
    mass: Tensor,
    lse: Tensor,
    counted: Tensor,
    counts: Counts,
    traits: AttentionTraits,
    tile: TileConfig,
) -> None:
    """Launch the kernel; it writes the mass.

    Args:
        inputs: q, k and the control, with the groups of the key ranges; no values.
        mass: (B, H, N) float32.
        lse: (B, H, M, G) float32, contiguous.
        counted: (R,) int32, 1 for the row segments that count.
        counts: sizes; n_blocks are blocks of BLOCK_N keys.
        traits: compile-time constants.
        tile: launch options.
    """
    column_mass_kernel[(counts.n_blocks * counts.n_items * counts.n_heads,)](
        inputs, mass, lse, counted, *counts, T=traits.constants(), **tile.options()
    )

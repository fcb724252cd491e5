"""What the attention kernels share: blocks of rows and of keys, tiles read from memory, products.

Names: p_ pointer, b_ block in registers, o_ offsets, m_ mask, n_ count. T holds the compile-time constants,
see traits.py. A row (.., D) is a tuple of N_PARTS tiles of T.PART_WIDTHS columns, written (.., D) in the
comments.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..segments import dot, find_rows, load_tile, pick, rounded, store_tile

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # log2 units; a finite bias stays finite


class TokenMatrix(NamedTuple):
    """A tensor descriptor of keys or values inside a kernel."""

    descriptor: TensorDescriptor
    steps: tuple[int, int, int]  # rows an item, rows a head, columns a head


class OpenRange(NamedTuple):
    """One key range of k or v, for one item and head."""

    p: tl.tensor  # pointer to its first key
    stride: tl.tensor  # of keys


class DescribedRange(NamedTuple):
    """OpenRange with T.DESCRIPTORS."""

    p: tl.tensor
    stride: tl.tensor
    descriptor: TensorDescriptor
    row: tl.tensor  # of the first key in the descriptor's matrix
    column: tl.tensor


class KeyValues(NamedTuple):
    """The keys and the values of one key range."""

    k: OpenRange | DescribedRange
    v: OpenRange | DescribedRange


class MixedTables(NamedTuple):
    """What load_mixed looks up for each key of a mixed range."""

    labels: tl.tensor | None  # (N,) int32 segment of each key
    bias: tl.tensor | None  # (C,) of the row segment
    weight: tl.tensor | None  # (C,) of the row segment


@triton.jit
def token_at(p, stride, b, n, h, T: tl.constexpr):
    """Pointer to token n of item b and head h; stride (item, token, head)."""
    p += tl.multiple_of(tl.cast(b, tl.int64) * stride[0], T.ALIGN)
    p += tl.multiple_of(tl.cast(n, tl.int64) * stride[1], T.ALIGN)
    return p + tl.multiple_of(tl.cast(h, tl.int64) * stride[2], T.ALIGN)


@triton.jit
def zeros(ROWS: tl.constexpr, T: tl.constexpr):
    """(ROWS, D) float32"""
    b_x = (tl.zeros([ROWS, T.PART_WIDTHS[0]], tl.float32),)
    for i in tl.static_range(1, T.N_PARTS):
        b_x += (tl.zeros([ROWS, T.PART_WIDTHS[i]], tl.float32),)
    return b_x


@triton.jit
def scaled(b_x, factor, T: tl.constexpr):
    """b_x * factor; b_x (ROWS, D), factor a scalar or (ROWS, 1)."""
    b_y = (b_x[0] * factor,)
    for i in tl.static_range(1, T.N_PARTS):
        b_y += (b_x[i] * factor,)
    return b_y


@triton.jit
def added(b_x, b_y, T: tl.constexpr):
    """b_x + b_y, both (ROWS, D), or b_y (1, D)."""
    b_z = (b_x[0] + b_y[0],)
    for i in tl.static_range(1, T.N_PARTS):
        b_z += (b_x[i] + b_y[i],)
    return b_z


@triton.jit
def with_sign_of(b_x, scale, T: tl.constexpr):
    """b_x (ROWS, D) times the sign of the scale: the largest product is then the largest logit."""
    sign = tl.where(scale < 0, -1.0, 1.0)
    b_y = ((b_x[0].to(tl.float32) * sign).to(b_x[0].dtype),)
    for i in tl.static_range(1, T.N_PARTS):
        b_y += ((b_x[i].to(tl.float32) * sign).to(b_x[i].dtype),)
    return b_y


@triton.jit
def masked_rows(b_x, m, T: tl.constexpr):
    """b_x (ROWS, D) with 0 in the rows outside m (ROWS,)."""
    b_y = (tl.where(m[:, None], b_x[0], 0.0),)
    for i in tl.static_range(1, T.N_PARTS):
        b_y += (tl.where(m[:, None], b_x[i], 0.0),)
    return b_y


@triton.jit
def load_rows(p, stride, m, ROWS: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr):
    """(ROWS, D) from p on; with MASKED, 0 in the rows outside m (ROWS,)."""
    b_x = (load_tile(p, stride, m, T.PART_STARTS[0], T.PART_WIDTHS[0], T.D, ROWS, T.ALIGN, MASKED),)
    for i in tl.static_range(1, T.N_PARTS):
        b_x += (load_tile(p, stride, m, T.PART_STARTS[i], T.PART_WIDTHS[i], T.D, ROWS, T.ALIGN, MASKED),)
    return b_x


@triton.jit
def store_rows(p, stride, b_x, m, ROWS: tl.constexpr, T: tl.constexpr):
    """Store the rows m (ROWS,) of b_x (ROWS, D) from p on."""
    for i in tl.static_range(T.N_PARTS):
        store_tile(
            p, stride, b_x[i], m, T.PART_STARTS[i], T.PART_WIDTHS[i], T.D, ROWS, T.ALIGN, T.EMULATE_BF16
        )


@triton.jit
def load_keys(key_range, j, m_n, MASKED: tl.constexpr, T: tl.constexpr):
    """Keys or values j .. j + BLOCK_N of an open range, (BLOCK_N, D); MASKED: 0 outside m_n (BLOCK_N,)."""
    if T.DESCRIPTORS:
        b_x = key_range.descriptor.load([key_range.row + j, key_range.column])
        if MASKED:
            b_x = tl.where(m_n[:, None], b_x, 0.0)
        return (b_x,)
    else:
        p = key_range.p + tl.multiple_of(tl.cast(j, tl.int64) * key_range.stride, T.ALIGN)
        return load_rows(p, key_range.stride, m_n, T.BLOCK_N, MASKED, T)


@triton.jit
def row_products(b_x, b_y, T: tl.constexpr):
    """X Y^T: (ROWS, D), (COLUMNS, D) -> (ROWS, COLUMNS) float32"""
    b_s = dot(b_x[0], tl.trans(b_y[0]), None, T.PRECISION, T.EMULATE_BF16)
    for i in tl.static_range(1, T.N_PARTS):
        b_s = dot(b_x[i], tl.trans(b_y[i]), b_s, T.PRECISION, T.EMULATE_BF16)
    return b_s


@triton.jit
def add_product(b_acc, b_p, b_x, T: tl.constexpr):
    """b_acc + P X, P rounded to the dtype of X: (ROWS, D), (ROWS, COLUMNS), (COLUMNS, D) -> (ROWS, D)"""
    b_p = rounded(b_p, b_x[0].dtype, T.EMULATE_BF16)
    b_y = (dot(b_p, b_x[0], b_acc[0], T.PRECISION, T.EMULATE_BF16),)
    for i in tl.static_range(1, T.N_PARTS):
        b_y += (dot(b_p, b_x[i], b_acc[i], T.PRECISION, T.EMULATE_BF16),)
    return b_y


@triton.jit
def query_item(q, b):
    """The item of q that output item b reads, int64."""
    item = tl.cast(b, tl.int64)
    if q.source is not None:
        item = tl.load(q.source + b)
    return item


@triton.jit
def open_range(tensors, matrix, b, h, c, start, counts, T: tl.constexpr):
    """The keys or values of segment c from token `start` on, for output item b and key head h.

    matrix: TokenMatrix with T.DESCRIPTORS, else None.
    """
    t = c
    if T.KEY_TENSORS == 1:
        t = 0
    if tensors.source is not None:
        b = tl.load(tensors.source + t * counts.n_items + b)
    stride = pick(tensors.stride_n, t, T.KEY_TENSORS)
    strides = (pick(tensors.stride_b, t, T.KEY_TENSORS), stride, pick(tensors.stride_h, t, T.KEY_TENSORS))
    p = token_at(pick(tensors.ps, t, T.KEY_TENSORS), strides, b, start, h, T)
    if T.DESCRIPTORS:
        row = tl.cast(b, tl.int32) * matrix.steps[0] + h * matrix.steps[1] + start
        return DescribedRange(p, stride, matrix.descriptor, row, h * matrix.steps[2])
    else:
        return OpenRange(p, stride)


@triton.jit
def open_keys_values(inputs, k_matrix, v_matrix, b, h, c, start, counts, T: tl.constexpr):
    """open_range for the keys and for the values."""
    k = open_range(inputs.k, k_matrix, b, h, c, start, counts, T)
    v = open_range(inputs.v, v_matrix, b, h, c, start, counts, T)
    return KeyValues(k, v)


@triton.jit
def range_segment(i, layout):
    """The segment of key range i, -1 for a range of several."""
    c = i
    if layout.segments is not None:
        c = tl.load(layout.segments + i)
    return c


@triton.jit
def item_starts(table, b):
    """Pointer to the starts of item b's segments or key ranges; None where there is one."""
    p_starts = None
    if table is not None:
        p_starts = table.p + b * table.stride[0]
    return p_starts


@triton.jit
def range_keys(i, c, b, p_starts, p_bias, layout, counts, T: tl.constexpr):
    """Key range i of segment c as one row segment sees it.

    p_starts: of the key ranges, from item_starts; p_bias: (C,) bias of the row segment, or None. Returns
    (first key in its tensor, number of keys, bias in log2 units); a removed pair has no keys.
    """
    start = 0
    n = counts.n_keys
    if p_starts is not None:
        start = tl.load(p_starts + i)
        n = tl.load(p_starts + i + 1) - start
    if T.KEY_TENSORS > 1:
        start = 0
    if layout.valid is not None:
        n = tl.minimum(n, tl.maximum(tl.load(layout.valid + b * counts.n_key_segments + c), 0))
    bias = 0.0
    if p_bias is not None:
        if T.MIXED:
            bias = tl.load(p_bias + c, mask=c >= 0, other=0.0)
        else:
            bias = tl.load(p_bias + c)
        n = tl.where(bias == float("-inf"), 0, n)
        bias = in_log2(bias)
    return start, n, bias


@triton.jit
def load_weight(p_weight, c, T: tl.constexpr):
    """Weight of segment c, 1 for a range of several; p_weight: (C,) of the row segment, or None."""
    weight = 1.0
    if p_weight is not None:
        if T.MIXED:
            weight = tl.load(p_weight + c, mask=c >= 0, other=1.0)
        else:
            weight = tl.load(p_weight + c)
    return weight


@triton.jit
def in_log2(bias):
    return tl.maximum(bias * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pair_row(table, b, h, r, counts):
    """Pointer to row r, (C,), of a table (1|B, 1|H, R, C) for item b and head h; None without a table."""
    p_row = None
    if table is not None:
        p_row = table.p + (b * table.stride[0] + h * table.stride[1] + r * counts.n_key_segments)
    return p_row


@triton.jit
def load_mixed(tables, o_n, m_n):
    """Bias and weight of each key of a mixed range.

    tables: MixedTables; o_n, m_n: (BLOCK_N,) keys and which of them exist. Returns (keys to read, keys whose
    values count, bias in log2 units, weight), each (BLOCK_N,).
    """
    b_label = tl.load(tables.labels + o_n, mask=m_n, other=0)
    b_bias = tl.zeros_like(b_label).to(tl.float32)
    b_weight = b_bias + 1.0
    if tables.bias is not None:
        b_bias = tl.load(tables.bias + b_label, mask=m_n, other=0.0)
        m_n = m_n & (b_bias != float("-inf"))
        b_bias = in_log2(b_bias)
    if tables.weight is not None:
        b_weight = tl.load(tables.weight + b_label, mask=m_n, other=0.0)
    return m_n, m_n & (b_weight != 0), b_bias, b_weight


@triton.jit
def load_lse_log2(p_lse, o_row, n_groups, g, m_m):
    """lse of rows in log2 units, (BLOCK_M,); 0 for a row without a key in the group, which reads none."""
    b_lse = tl.load(p_lse + o_row * n_groups + g, mask=m_m, other=0.0)
    return tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E)


class KeyBlock(NamedTuple):
    """The block of keys that a program owns."""

    c: tl.tensor  # segment, -1: several
    g: tl.tensor  # group
    first: tl.tensor  # first key
    start: tl.tensor  # that key within its tensor
    end: tl.tensor  # end of the key range
    limit: tl.tensor  # end of its keys that exist


@triton.jit
def find_key_block(block, b, layout, counts, T: tl.constexpr):
    """The keys of block `block` of item b; a block beyond the item's last one has first == end."""
    p_starts = item_starts(layout.key_starts, b)
    i, first, end = find_rows(block, p_starts, counts.n_ranges, counts.n_keys, T.BLOCK_N)
    c = range_segment(i, layout)
    range_start = 0
    if p_starts is not None:
        range_start = tl.load(p_starts + i)
    start = first
    if T.KEY_TENSORS > 1:
        start = first - range_start
    limit = end
    if layout.valid is not None:
        n_valid = tl.maximum(tl.load(layout.valid + b * counts.n_key_segments + c), 0)
        limit = range_start + tl.minimum(n_valid, end - range_start)
    g = 0
    if layout.groups is not None:
        g = tl.load(layout.groups + i)
    return KeyBlock(c, g, first, start, end, limit)


@triton.jit
def load_labels(c, p_labels, o_n, m_n, T: tl.constexpr):
    """(segments of a block's keys, which of them exist): (BLOCK_N,) with T.MIXED, else (1,)."""
    if T.MIXED:
        return tl.where(c < 0, tl.load(p_labels + o_n, mask=m_n, other=0), tl.maximum(c, 0)), m_n
    else:
        return tl.full([1], c, tl.int32), tl.full([1], 1, tl.int1)


@triton.jit
def load_block_bias(table, b, h, r, b_label, m_label, counts):
    """Bias of a block's keys for row segment r.

    table: Table of biases, or None; b_label, m_label: from load_labels. Returns (bias in log2 units, keys
    that the rows see, 1 if they see any); the first two have the shape of b_label.
    """
    b_bias = tl.zeros_like(b_label).to(tl.float32)
    m_seen = m_label
    if table is not None:
        b_bias = tl.load(pair_row(table, b, h, r, counts) + b_label, mask=m_label, other=0.0)
        m_seen = m_label & (b_bias != float("-inf"))
        b_bias = in_log2(b_bias)
    return b_bias, m_seen, tl.max(m_seen.to(tl.int32), 0)


@triton.jit
def load_scale(table, b, h):
    """Scale of item b and head h."""
    return tl.load(table.p + b * table.stride[0] + h * table.stride[1])


@triton.jit
def load_gain(table, b, h, r):
    """Gain of row segment r for item b and head h."""
    return tl.load(table.p + b * table.stride[0] + h * table.stride[1] + r)


@triton.jit
def load_value_sum(p, weight, T: tl.constexpr):
    """weight times D float32 at p, (1, D); a weight of 0 reads nothing."""
    m = tl.full([1, 1], weight, tl.float32) != 0
    o_d = tl.arange(0, T.PART_WIDTHS[0])[None, :]
    b_x = (tl.load(p + o_d, mask=(o_d < T.D) & m, other=0.0) * weight,)
    for i in tl.static_range(1, T.N_PARTS):
        o_d = T.PART_STARTS[i] + tl.arange(0, T.PART_WIDTHS[i])[None, :]
        b_x += (tl.load(p + o_d, mask=(o_d < T.D) & m, other=0.0) * weight,)
    return b_x

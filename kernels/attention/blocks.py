"""Blocks of rows, tiles of keys and values: what the attention kernels are compiled for, read, multiply and
store.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..segments import dot, find_rows, load_tile, pick, rounded, store_tile

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # a finite bias stays finite in log2 units


class Traits(NamedTuple):
    """What a kernel is compiled for; features that it does not name are compiled away."""

    D: int
    PARTS: tuple[int, ...]  # the head dim as tiles of these widths, powers of two
    FIRSTS: tuple[int, ...]  # the first column of each
    N_PARTS: int
    BLOCK_M: int
    BLOCK_N: int
    TENSORS: int  # 1: all keys in one tensor; else one per key segment
    HEADS_PER_KV: int
    ALIGN: int  # a power of two that divides every stride
    DESCRIBED: bool  # full tiles of keys and values are read through tensor descriptors
    RAGGED: bool  # an item may have fewer row blocks than the grid
    GROUPED: bool  # several softmax groups
    LANES: bool  # neighbouring short segments share tiles, each key with the constants of its own
    SILENT: bool  # some tiles count in max and sum, but their values are not read
    UNCLIPPED: bool  # some group has a contrast without clip
    CLIPPED: bool  # some group has one with clip: a second sweep
    SIGNED: bool  # the scale may be negative
    MASS: int  # columns of the mass, a power of two; 0: no mass
    PERSISTENT: bool  # as many programs as the GPU runs at once walk the row blocks
    SPECIALIZED: bool  # warps that copy beside warps that multiply, where Triton makes them
    PRECISION: str  # of float32 products
    EMULATE: bool  # bfloat16 in the interpreter

    def constants(self) -> Traits:
        """The same, each field a constant of its own: Triton 3.6 and 3.7 take a plain field for a run-time
        number.
        """
        return _constants(self)


@functools.lru_cache(1024)
def _constants(traits: Traits) -> Traits:
    return Traits(*(tuple(map(tl.constexpr, x)) if isinstance(x, tuple) else tl.constexpr(x) for x in traits))


@triton.jit
def token_at(p, stride, b, n, h, T: tl.constexpr):
    """Pointer to token n of item b and head h; stride (item, token, head)"""
    p += tl.multiple_of(tl.cast(b, tl.int64) * stride[0], T.ALIGN)
    p += tl.multiple_of(tl.cast(n, tl.int64) * stride[1], T.ALIGN)
    return p + tl.multiple_of(tl.cast(h, tl.int64) * stride[2], T.ALIGN)


@triton.jit
def zeros(ROWS: tl.constexpr, T: tl.constexpr):
    """(ROWS, D) as one tile for each of T.PARTS"""
    b_x = (tl.zeros([ROWS, T.PARTS[0]], tl.float32),)
    for i in tl.static_range(1, T.N_PARTS):
        b_x += (tl.zeros([ROWS, T.PARTS[i]], tl.float32),)
    return b_x


@triton.jit
def scaled(b_x, factor, T: tl.constexpr):
    b_y = (b_x[0] * factor,)
    for i in tl.static_range(1, T.N_PARTS):
        b_y += (b_x[i] * factor,)
    return b_y


@triton.jit
def added(b_x, b_y, T: tl.constexpr):
    b_z = (b_x[0] + b_y[0],)
    for i in tl.static_range(1, T.N_PARTS):
        b_z += (b_x[i] + b_y[i],)
    return b_z


@triton.jit
def flipped(b_x, scale, T: tl.constexpr):
    """b_x with the scale's sign, so that the largest product is the largest logit"""
    sign = tl.where(scale < 0, -1.0, 1.0)
    b_y = ((b_x[0].to(tl.float32) * sign).to(b_x[0].dtype),)
    for i in tl.static_range(1, T.N_PARTS):
        b_y += ((b_x[i].to(tl.float32) * sign).to(b_x[i].dtype),)
    return b_y


@triton.jit
def load_rows(p, stride, m, ROWS: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr):
    """ROWS rows from p on, those outside m as 0 if MASKED"""
    b_x = (load_tile(p, stride, m, T.FIRSTS[0], T.PARTS[0], T.D, ROWS, T.ALIGN, MASKED),)
    for i in tl.static_range(1, T.N_PARTS):
        b_x += (load_tile(p, stride, m, T.FIRSTS[i], T.PARTS[i], T.D, ROWS, T.ALIGN, MASKED),)
    return b_x


@triton.jit
def store_rows(p, stride, b_x, m, ROWS: tl.constexpr, T: tl.constexpr):
    for i in tl.static_range(T.N_PARTS):
        store_tile(p, stride, b_x[i], m, T.FIRSTS[i], T.PARTS[i], T.D, ROWS, T.ALIGN, T.EMULATE)


@triton.jit
def load_keys(x, j, m_n, MASKED: tl.constexpr, T: tl.constexpr):
    """The tile from key j on, of what open_tensor returned; those outside m_n as 0 if MASKED"""
    if T.DESCRIBED:
        b_x = x[2].load([x[3] + j, x[4]])
        if MASKED:
            b_x = tl.where(m_n[:, None], b_x, 0.0)
        return (b_x,)
    else:
        return load_rows(
            x[0] + tl.multiple_of(tl.cast(j, tl.int64) * x[1], T.ALIGN), x[1], m_n, T.BLOCK_N, MASKED, T
        )


@triton.jit
def row_products(b_x, b_y, T: tl.constexpr):
    """<x_i, y_j> for all rows of two blocks"""
    b_s = dot(b_x[0], tl.trans(b_y[0]), None, T.PRECISION, T.EMULATE)
    for i in tl.static_range(1, T.N_PARTS):
        b_s = dot(b_x[i], tl.trans(b_y[i]), b_s, T.PRECISION, T.EMULATE)
    return b_s


@triton.jit
def combined(b_acc, b_p, b_x, T: tl.constexpr):
    """b_acc + P X, P rounded to the dtype of X"""
    b_p = rounded(b_p, b_x[0].dtype, T.EMULATE)
    b_y = (dot(b_p, b_x[0], b_acc[0], T.PRECISION, T.EMULATE),)
    for i in tl.static_range(1, T.N_PARTS):
        b_y += (dot(b_p, b_x[i], b_acc[i], T.PRECISION, T.EMULATE),)
    return b_y


@triton.jit
def products(b_q, keys, j, m_n, MASKED: tl.constexpr, T: tl.constexpr):
    """<q_i, k_j> of the tile from key j on, (BLOCK_M, BLOCK_N)"""
    return row_products(b_q, load_keys(keys, j, m_n, MASKED, T), T)


@triton.jit
def accumulate(b_acc, b_p, values, j, m_n, MASKED: tl.constexpr, T: tl.constexpr):
    """b_acc + P V of the tile from key j on"""
    return combined(b_acc, b_p, load_keys(values, j, m_n, MASKED, T), T)


@triton.jit
def open_tensor(
    p_xs, stride_b, stride_n, stride_h, p_source, d_x, steps, b, h, c, start, n_items, T: tl.constexpr
):
    """(pointer to the first token of segment c for one item and head, stride of its tokens)

    With T.DESCRIBED also the descriptor, and the token's row and column in it.
    """
    t = c
    if T.TENSORS == 1:
        t = 0
    if p_source is not None:
        b = tl.load(p_source + t * n_items + b)
    stride = pick(stride_n, t, T.TENSORS)
    strides = (pick(stride_b, t, T.TENSORS), stride, pick(stride_h, t, T.TENSORS))
    x = token_at(pick(p_xs, t, T.TENSORS), strides, b, start, h, T)
    if T.DESCRIBED:
        row = tl.cast(b, tl.int32) * steps[0] + h * steps[1] + start
        return x, stride, d_x, row, h * steps[2]
    else:
        return x, stride


@triton.jit
def segment_of(i, p_segments):
    """The segment of a piece, -1 for a piece of several short ones"""
    c = i
    if p_segments is not None:
        c = tl.load(p_segments + i)
    return c


@triton.jit
def open_pair(i, c, b, p_key_starts, n_keys, n_key_segments, p_valid, p_bias, T: tl.constexpr):
    """(first key in its tensor, keys to read, bias in log2 units) of piece i, segment c, for this program's
    rows
    """
    start = 0
    n = n_keys
    if p_key_starts is not None:
        start = tl.load(p_key_starts + i)
        n = tl.load(p_key_starts + i + 1) - start
    if T.TENSORS > 1:
        start = 0
    if p_valid is not None:
        n = tl.minimum(n, tl.maximum(tl.load(p_valid + b * n_key_segments + c), 0))
    bias = 0.0
    if p_bias is not None:
        if T.LANES:
            bias = tl.load(p_bias + c, mask=c >= 0, other=0.0)
        else:
            bias = tl.load(p_bias + c)
        n = tl.where(bias == float("-inf"), 0, n)
        bias = in_log2(bias)
    return start, n, bias


@triton.jit
def load_weight(p_weight, c, T: tl.constexpr):
    """Weight of segment c for this program's rows; 1 for a piece of several segments"""
    weight = 1.0
    if p_weight is not None:
        if T.LANES:
            weight = tl.load(p_weight + c, mask=c >= 0, other=1.0)
        else:
            weight = tl.load(p_weight + c)
    return weight


@triton.jit
def in_log2(bias):
    return tl.maximum(bias * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def open_lanes(p_labels, p_bias, p_weight, o_n, m_n):
    """(keys to read, keys whose values count, bias in log2 units, weight) of a tile of several short segments

    p_labels: (N,) int32 segment of each key.
    """
    b_label = tl.load(p_labels + o_n, mask=m_n, other=0)
    b_bias = tl.zeros_like(b_label).to(tl.float32)
    b_weight = b_bias + 1.0
    if p_bias is not None:
        b_bias = tl.load(p_bias + b_label, mask=m_n, other=0.0)
        m_n = m_n & (b_bias != float("-inf"))
        b_bias = in_log2(b_bias)
    if p_weight is not None:
        b_weight = tl.load(p_weight + b_label, mask=m_n, other=0.0)
    return m_n, m_n & (b_weight != 0), b_bias, b_weight


@triton.jit
def exponent_shift(p_lse, o_row, n_groups, g, m_m):
    """lse of a block of rows in log2 units; a row without a key subtracts 0, as none of its keys is visited"""
    b_lse = tl.load(p_lse + o_row * n_groups + g, mask=m_m, other=0.0)
    return tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E)


@triton.jit
def find_keys(
    block, b, p_key_starts, p_segments, p_groups, p_valid, n_keys, n_pieces, n_key_segments, T: tl.constexpr
):
    """What a program that owns a block of keys owns

    (segment, -1: several; group; the block's first key; that key within its tensor; end of the piece; end of
    its keys that exist)
    """
    i, first, end = find_rows(block, p_key_starts, n_pieces, n_keys, T.BLOCK_N)
    c = segment_of(i, p_segments)
    segment_start = 0
    if p_key_starts is not None:
        segment_start = tl.load(p_key_starts + i)
    start = first
    if T.TENSORS > 1:
        start = first - segment_start
    limit = end
    if p_valid is not None:
        n_valid = tl.maximum(tl.load(p_valid + b * n_key_segments + c), 0)
        limit = segment_start + tl.minimum(n_valid, end - segment_start)
    g = 0
    if p_groups is not None:
        g = tl.load(p_groups + i)
    return c, g, first, start, end, limit


@triton.jit
def labels_of(c, p_labels, o_n, m_n, T: tl.constexpr):
    """Segments of a block's keys, (BLOCK_N,) where they may differ, else (1,); and which of them to look up"""
    if T.LANES:
        return tl.where(c < 0, tl.load(p_labels + o_n, mask=m_n, other=0), tl.maximum(c, 0)), m_n
    else:
        return tl.full([1], c, tl.int32), tl.full([1], 1, tl.int1)


@triton.jit
def lane_bias(p_bias, o_bias, b_label, m_label, T: tl.constexpr):
    """(bias in log2 units by label, labels that these rows see, 1 if they see any)"""
    b_bias = tl.zeros_like(b_label).to(tl.float32)
    m_lane = m_label
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_bias + b_label, mask=m_label, other=0.0)
        m_lane = m_label & (b_bias != float("-inf"))
        b_bias = in_log2(b_bias)
    return b_bias, m_lane, tl.max(m_lane.to(tl.int32), 0)


@triton.jit
def load_level(p, weight, T: tl.constexpr):
    """weight times D float32 at p, as rows (1, T.PARTS[i]); a weight of 0 reads none"""
    m = tl.full([1, 1], weight, tl.float32) != 0
    o_d = tl.arange(0, T.PARTS[0])[None, :]
    b_x = (tl.load(p + o_d, mask=(o_d < T.D) & m, other=0.0) * weight,)
    for i in tl.static_range(1, T.N_PARTS):
        o_d = T.FIRSTS[i] + tl.arange(0, T.PARTS[i])[None, :]
        b_x += (tl.load(p + o_d, mask=(o_d < T.D) & m, other=0.0) * weight,)
    return b_x


class Descriptor(NamedTuple):
    """A tensor (batch, tokens, heads, D) as a matrix: token n of item b and head h is D columns of one row."""

    base: Tensor
    rows: int
    columns: int
    stride: int
    steps: tuple[int, int, int]  # row b * steps[0] + h * steps[1] + n, column h * steps[2]

    def make(self, traits: Traits) -> TensorDescriptor:
        shape, strides = [self.rows, self.columns], [self.stride, 1]
        return TensorDescriptor(self.base, shape, strides, [traits.BLOCK_N, traits.D])


def describe(t: Tensor, broadcast: bool) -> Descriptor | None:
    """The matrix that holds t, if its strides allow one; broadcast: every item reads the first.

    Rows are tokens, and heads lie beside each other in a row or follow each other in rows. The copy engine
    wants the base and the stride to be multiples of 16 bytes.
    """
    batch, tokens, heads, dim = t.shape
    stride_b, stride_n, stride_h, _ = t.stride()
    if tokens == 0 or t.data_ptr() % 16 or stride_n * t.element_size() % 16 or stride_n < dim:
        return None
    row_b, row_h, column_h = 0, 0, 0
    if batch > 1 and not broadcast:
        if stride_b % stride_n:
            return None
        row_b = stride_b // stride_n
    if heads > 1 and stride_h % stride_n == 0:
        row_h = stride_h // stride_n
    elif heads > 1:
        if (heads - 1) * stride_h + dim > stride_n:
            return None
        column_h = stride_h
    rows = (batch - 1) * row_b + (heads - 1) * row_h + tokens
    return Descriptor(t, rows, (heads - 1) * column_h + dim, stride_n, (row_b, row_h, column_h))


def item_strides(t: Tensor | None) -> tuple[int, int]:
    """Strides of the first two dimensions, 0 where one is broadcast."""
    if t is None:
        return 0, 0
    return t.stride(0) * (t.shape[0] > 1), t.stride(1) * (t.shape[1] > 1)


def token_strides(t: Tensor) -> tuple[int, int, int]:
    """Strides of items, tokens and heads."""
    return t.stride(0), t.stride(1), t.stride(2)


def list_strides(name: str, tensors: Sequence[Tensor], source: Tensor | None) -> dict[str, tuple[int, ...]]:
    """stride_{name}b, n and h: strides of items (0 where one item serves all), tokens and heads of each
    tensor.
    """
    return {
        f"stride_{name}b": tuple(t.stride(0) if source is not None or t.shape[0] > 1 else 0 for t in tensors),
        f"stride_{name}n": tuple(t.stride(1) for t in tensors),
        f"stride_{name}h": tuple(t.stride(2) for t in tensors),
    }


def alignment(tensors: Sequence[Tensor]) -> int:
    """The largest power of two, up to 16, that divides the strides of every item, token and head."""
    common = 16
    for t in tensors:
        for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True):
            common = math.gcd(common, stride) if size > 1 else common
    return common

"""Shared by the kernels over segments: the rows of a block, tiles of memory, rounding to the stored dtype."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_rows(block, p_starts, n_segments, n_rows, BLOCK_M: tl.constexpr):
    """(segment, first row, end of the segment) of a row block; no block lies in two segments.

    p_starts: (R + 1,) int32 starts of one item's segments, or None for one segment of n_rows rows. A block
    beyond the item's last one gets first == end.
    """
    segment = 0
    first = block * BLOCK_M
    end = n_rows
    if p_starts is not None:
        first = n_rows
        seen = 0  # row blocks of the segments passed
        for r in range(0, n_segments):
            start = tl.load(p_starts + r)
            stop = tl.load(p_starts + r + 1)
            mine = (block >= seen) & (block < seen + tl.cdiv(stop - start, BLOCK_M))
            segment = tl.where(mine, r, segment)
            first = tl.where(mine, start + (block - seen) * BLOCK_M, first)
            end = tl.where(mine, stop, end)
            seen += tl.cdiv(stop - start, BLOCK_M)
    return segment, first, end


@triton.jit
def pick(values, i, N: tl.constexpr):
    """values[i] of a tuple of N kernel arguments, by selects, which keep what Triton knows of alignment."""
    value = values[0]
    for j in tl.static_range(1, N):
        value = tl.where(i == j, values[j], value)
    return value


@triton.jit
def load_tile(
    p,
    stride,
    m_n,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(ROWS, WIDTH) from column FIRST of rows of D numbers.

    Columns from D on, and rows outside m_n if MASKED, are 0.
    """
    o_d = FIRST + tl.arange(0, WIDTH)
    p_tile = p + tl.multiple_of(tl.arange(0, ROWS) * stride, ALIGN)[:, None] + o_d[None, :]
    if FIRST + WIDTH <= D:
        if MASKED:
            return tl.load(p_tile, mask=m_n[:, None], other=0.0)
        else:
            return tl.load(p_tile)
    else:
        if MASKED:
            return tl.load(p_tile, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        else:
            return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def store_tile(
    p,
    stride,
    b_x,
    m_n,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    EMULATE: tl.constexpr,
):
    o_d = FIRST + tl.arange(0, WIDTH)
    p_tile = p + tl.multiple_of(tl.arange(0, ROWS) * stride, ALIGN)[:, None] + o_d[None, :]
    tl.store(p_tile, rounded(b_x, p.dtype.element_ty, EMULATE), mask=m_n[:, None] & (o_d < D)[None, :])


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """float32 to DTYPE.

    EMULATE: round to nearest even first, because Triton's interpreter truncates to bfloat16.
    """
    if EMULATE:
        bits = b_x.to(tl.int32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        b_x = tl.where(b_x == b_x, bits.to(tl.float32, bitcast=True), b_x)
    return b_x.to(DTYPE)


@triton.jit
def dot(b_x, b_y, b_acc, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """b_x @ b_y + b_acc in float32.

    EMULATE: convert to float32 first, because the interpreter computes bfloat16 on its bits.
    """
    if EMULATE:
        return tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_acc, input_precision="ieee")
    else:
        return tl.dot(b_x, b_y, b_acc, input_precision=PRECISION)

"""adain: the statistics of every channel in chunks, then x with its own mean and deviation exchanged for the
style's.

Both levels of the sums have a fixed order. Verified in Triton's interpreter and compiled for sm_80 and sm_90;
not yet run on hardware.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segments import rounded
from .strides import Walk, collapse, offsets

MOST_CHUNKS = 64


class Tile(NamedTuple):
    channels: int  # a program's
    space: int  # elements of each at a time
    chunks: int  # into which the space is cut, each with sums of its own
    chunk: int  # elements of one


def tile_of(walk: Walk, channels: int, channel_stride: int) -> Tile:
    """A tile along the contiguous one of space and channels, and enough chunks to fill a GPU."""
    space = math.prod(walk.sizes)
    across = channel_stride == 1 and walk.strides[0][-1] != 1
    block_c, block_s = (min(32, triton.next_power_of_2(channels)), 64) if across else (1, 1024)
    blocks = triton.cdiv(space, block_s)
    chunk = triton.cdiv(blocks, MOST_CHUNKS) * block_s
    return Tile(block_c, block_s, triton.cdiv(space, chunk), chunk)


@triton.jit
def place(n_channels, n_chunks, n_chunk, n_space, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """(item, channels, chunk, first and last element) of a program"""
    chunk = tl.program_id(0) % n_chunks
    n_blocks = tl.cdiv(n_channels, BLOCK_C)
    o_c = tl.program_id(0) // n_chunks % n_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(0) // n_chunks // n_blocks
    first = chunk * n_chunk
    if WIDE:
        first = chunk.to(tl.int64) * n_chunk
    return b.to(tl.int64), o_c.to(tl.int64), chunk, first, tl.minimum(first + n_chunk, n_space)


@triton.jit
def load_inside(p_mask, s_mask, o, m, sizes, DIMS: tl.constexpr):
    """m where the mask, if there is one, is set"""
    if p_mask is not None:
        m = m & (tl.load(p_mask + offsets(o, sizes, s_mask, DIMS), mask=m, other=0) != 0)
    return m


@triton.jit
def adain_statistics_kernel(
    p_x,
    p_mask,
    p_sums,
    stride_b,
    stride_c,
    stride_mask,
    s_x,
    s_mask,
    sizes,
    n_channels,
    n_space,
    n_chunks,
    n_chunk,
    DIMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, o_c, chunk, first, end = place(n_channels, n_chunks, n_chunk, n_space, BLOCK_C, WIDE)
    m_c = o_c < n_channels
    p_x += b * stride_b + o_c[:, None] * stride_c
    if p_mask is not None:
        p_mask += b * stride_mask
    seen = 0.0
    b_shift = tl.zeros([BLOCK_C], tl.float32)
    b_mean = tl.zeros([BLOCK_C], tl.float32)
    b_square = tl.zeros([BLOCK_C], tl.float32)
    for s in range(first, end, BLOCK_S):
        o = s + tl.arange(0, BLOCK_S)
        m = load_inside(p_mask, s_mask, o, o < end, sizes, DIMS)
        m_x = m_c[:, None] & m[None, :]
        b_x = tl.load(p_x + offsets(o, sizes, s_x, DIMS)[None, :], mask=m_x, other=0.0).to(tl.float32)
        count = tl.sum(m.to(tl.float32), 0)
        divisor = tl.maximum(count, 1.0)
        # all but the first block's mean are taken of differences from it: a large one leaves their digits
        # alone
        b_shift = tl.where(seen == 0, tl.sum(b_x, 1) / divisor, b_shift)
        b_x = tl.where(m_x, b_x - b_shift[:, None], 0.0)
        b_step = tl.sum(b_x, 1) / divisor
        b_x = tl.where(m_x, b_x - b_step[:, None], 0.0)
        b_step -= b_mean
        share = count / tl.maximum(seen + count, 1.0)
        b_mean += b_step * share
        b_square += tl.sum(b_x * b_x, 1) + b_step * b_step * (seen * share)
        seen += count
    p_sums += ((b * n_channels + o_c) * 4) * n_chunks + chunk
    tl.store(p_sums, tl.zeros([BLOCK_C], tl.float32) + seen, mask=m_c)
    tl.store(p_sums + n_chunks, b_shift, mask=m_c)
    tl.store(p_sums + 2 * n_chunks, b_mean, mask=m_c)
    tl.store(p_sums + 3 * n_chunks, b_square, mask=m_c)


@triton.jit
def combine(p_sums, m_c, n_chunks, eps, BLOCK_K: tl.constexpr):
    """(shift, mean - shift, deviation) of channels whose chunks' sums begin at p_sums"""
    o_k = tl.arange(0, BLOCK_K)[None, :]
    m = m_c[:, None] & (o_k < n_chunks)
    p_sums = p_sums[:, None] + o_k
    b_count = tl.load(p_sums, mask=m, other=0.0)
    b_shift = tl.load(p_sums + n_chunks, mask=m, other=0.0)
    b_mean = tl.load(p_sums + 2 * n_chunks, mask=m, other=0.0)
    b_square = tl.load(p_sums + 3 * n_chunks, mask=m, other=0.0)
    b_all = tl.sum(b_count, 1)
    # any value near the data will do
    b_near = tl.max(tl.where(b_count > 0, b_shift, float("-inf")), 1)
    b_mean = tl.where(b_count > 0, b_shift - b_near[:, None] + b_mean, 0.0)
    b_total = tl.sum(b_count * b_mean, 1) / b_all
    b_mean = tl.where(b_count > 0, b_mean - b_total[:, None], 0.0)
    b_variance = tl.sum(b_square + b_count * b_mean * b_mean, 1) / (b_all - 1.0)
    return b_near, b_total, tl.sqrt_rn(b_variance + eps)


@triton.jit
def adain_apply_kernel(
    p_out,
    p_x,
    p_mask,
    p_sums,
    p_style_sums,
    stride_out_b,
    stride_out_c,
    stride_b,
    stride_c,
    stride_mask,
    stride_style,
    s_x,
    s_out,
    s_mask,
    sizes,
    n_channels,
    n_space,
    n_chunks,
    n_chunk,
    n_style_chunks,
    eps,
    DIMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_STYLE: tl.constexpr,
    WIDE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    b, o_c, _, first, end = place(n_channels, n_chunks, n_chunk, n_space, BLOCK_C, WIDE)
    m_c = o_c < n_channels
    b_shift, b_mean, b_std = combine(
        p_sums + (b * n_channels + o_c) * 4 * n_chunks, m_c, n_chunks, eps, BLOCK_K
    )
    p_style_sums += b * stride_style + o_c * 4 * n_style_chunks
    b_to, b_rest, b_wanted = combine(p_style_sums, m_c, n_style_chunks, eps, BLOCK_STYLE)
    b_ratio = (b_wanted / b_std)[:, None]
    p_x += b * stride_b + o_c[:, None] * stride_c
    p_out += b * stride_out_b + o_c[:, None] * stride_out_c
    if p_mask is not None:
        p_mask += b * stride_mask
    for s in range(first, end, BLOCK_S):
        o = s + tl.arange(0, BLOCK_S)
        m = m_c[:, None] & (o < end)[None, :]
        b_x = tl.load(p_x + offsets(o, sizes, s_x, DIMS)[None, :], mask=m, other=0.0)
        b_y = ((b_x.to(tl.float32) - b_shift[:, None]) - b_mean[:, None]) * b_ratio
        b_y = rounded(b_y + b_rest[:, None] + b_to[:, None], p_out.dtype.element_ty, EMULATE)
        if p_mask is not None:
            b_y = tl.where(load_inside(p_mask, s_mask, o, o < end, sizes, DIMS)[None, :], b_y, b_x)
        tl.store(p_out + offsets(o, sizes, s_out, DIMS)[None, :], b_y, mask=m)


def walk_space(x: Tensor, *others: Tensor | None) -> Walk:
    """The dimensions that x (batch, channels, ...) and others have in common behind the channels; None: moves
    nowhere.
    """
    shape = tuple(x.shape[2:])
    return collapse(shape, *((0,) * len(shape) if t is None else t.stride()[2:] for t in (x, *others)))


def adain_statistics(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (batch, channels, ...), mask uint8 (1|batch, 1, ...) -> (batch, channels, 4, chunks) float32.

    Of each chunk: how many elements count, a value near them, their mean less that value, and the sum of
    their squared differences from the mean (Chan, Golub, LeVeque 1979, updating by blocks).
    """
    batch, channels = x.shape[:2]
    walk = walk_space(x, mask)
    tile = tile_of(walk, channels, x.stride(1))
    sums = torch.empty(batch, channels, 4, tile.chunks, dtype=torch.float32, device=x.device)
    adain_statistics_kernel[(batch * triton.cdiv(channels, tile.channels) * tile.chunks,)](
        x,
        mask,
        sums,
        x.stride(0),
        x.stride(1),
        item_stride(mask),
        *walk.strides,
        walk.sizes,
        channels,
        math.prod(walk.sizes),
        tile.chunks,
        tile.chunk,
        DIMS=len(walk.sizes),
        BLOCK_C=tile.channels,
        BLOCK_S=tile.space,
        WIDE=walk.wide,
        num_warps=4,
    )
    return sums


def adain_apply(
    out: Tensor, x: Tensor, mask: Tensor | None, sums: Tensor, style_sums: Tensor, eps: float, emulate: bool
) -> None:
    """out = (x - mean) / std * style std + style mean in the mask, x elsewhere; std = sqrt(unbiased variance
    + eps).

    out and x (batch, channels, ...), mask uint8 (1|batch, 1, ...); sums and style_sums (1 item broadcasts) as
    adain_statistics gives them.
    """
    batch, channels = x.shape[:2]
    walk = walk_space(x, out, mask)
    tile = tile_of(walk, channels, x.stride(1))
    chunks, style_chunks = sums.shape[3], style_sums.shape[3]
    adain_apply_kernel[(batch * triton.cdiv(channels, tile.channels) * tile.chunks,)](
        out,
        x,
        mask,
        sums,
        style_sums,
        out.stride(0),
        out.stride(1),
        x.stride(0),
        x.stride(1),
        item_stride(mask),
        item_stride(style_sums),
        *walk.strides,
        walk.sizes,
        channels,
        math.prod(walk.sizes),
        tile.chunks,
        tile.chunk,
        style_chunks,
        eps,
        DIMS=len(walk.sizes),
        BLOCK_C=tile.channels,
        BLOCK_S=tile.space,
        BLOCK_K=triton.next_power_of_2(chunks),
        BLOCK_STYLE=triton.next_power_of_2(style_chunks),
        WIDE=walk.wide,
        EMULATE=emulate,
        num_warps=4,
    )


def item_stride(t: Tensor | None) -> int:
    """Of the first dimension, 0 where it is broadcast."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)

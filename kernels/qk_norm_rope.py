"""RMSNorm per head, an additive offset and rotary embedding of several token streams, joined into one tensor.

    y = x / sqrt(mean(x^2) + eps) * weight + offset        out = y * cos + rotate(y) * sin

A program takes a few output tokens with their heads, so that cos and sin of a token are read once for BLOCK_H
heads. One masked read loads rows of all streams, strides and items, because a token's stream changes only
its address; the permutation costs one index. Rows are held as two tiles, the first and second numbers of the
pairs, (tokens, heads, pairs) each, in float32 from the read to the one rounding at the write.

Backward, with g = rotate^T(dout) * weight and r = 1 / sqrt(mean(x^2) + eps):

    dx = r * (g - x * r^2 * mean(g * x))
    dweight = sum rotate^T(dout) * x * r
    doffset = rotate^T(dout)

Verified in Triton's interpreter and compiled for sm_80 and sm_90; not yet run on hardware.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segments import rounded

MOST_PARTS = 1024  # programs of the backward with sums of the weights' gradients


class Traits(NamedTuple):
    """What a kernel is compiled for."""

    D: int
    STREAMS: int
    INTERLEAVED: (
        bool  # pairs (2i, 2i + 1); else (i, i + ceil(D / 2)), which is also how rows without pairs are read
    )
    NORMED: tuple[bool, ...]  # by stream: it has a norm
    ANY_NORMED: bool
    SHIFTED: tuple[bool, ...]  # by stream: it has an offset; backward: one whose gradient is wanted
    BLOCK_T: int
    BLOCK_H: int
    PAIRS: int  # a power of two, at least ceil(D / 2)
    ALIGN: int  # bytes, a power of two that divides the address of every row of x, dx and dout
    EMULATE: bool  # the interpreter


class Blocks(NamedTuple):
    tokens: int
    heads: int
    pairs: int
    warps: int


def norm_rope_blocks(heads: int, dim: int) -> Blocks:
    """4096 numbers a program: with four warps each thread has 32, four or eight 16-byte reads in flight.

    A block takes as many heads as fit before it takes more tokens: all heads share a token's cos and sin,
    which are as large as two float32 rows. Four warps cover 8 rows of D 128 at a time, so that the unused
    part of 32 heads is skipped where a model has 24.
    """
    pairs = triton.next_power_of_2(max(1, (dim + 1) // 2))
    block_h = min(triton.next_power_of_2(heads), max(1, 2048 // pairs))
    return Blocks(max(1, min(16, 2048 // (pairs * block_h))), block_h, pairs, 4)


@triton.jit
def place_tokens(p_permutation, stride_permutation, b, o_t, n_tokens, n_total, T: tl.constexpr):
    """(joined token, stream, token in its stream, mask) of the output tokens o_t (BLOCK_T,) of item b.

    The mask leaves out an index outside of the joined tokens: nothing is read for it.
    """
    STREAMS: tl.constexpr = T.STREAMS
    m_t = o_t < n_total
    b_joined = o_t.to(tl.int64)
    if p_permutation is not None:
        p_index = p_permutation + b * stride_permutation[0] + b_joined * stride_permutation[1]
        b_joined = tl.load(p_index, mask=m_t, other=-1).to(tl.int64)
        m_t = (b_joined >= 0) & (b_joined < n_total)
    b_stream = tl.full([T.BLOCK_T], 0, tl.int32)
    b_token = b_joined
    start = n_tokens[0]
    for s in tl.static_range(1, STREAMS):
        m_s = b_joined >= start
        b_stream = tl.where(m_s, s, b_stream)
        b_token = tl.where(m_s, b_joined - start, b_token)
        start += n_tokens[s]
    return b_joined, b_stream, b_token, m_t


@triton.jit
def stream_rows(p_xs, strides, b, b_stream, b_token, o_h, T: tl.constexpr):
    """Pointers to the rows of item b, (BLOCK_T, BLOCK_H, 1); strides: (item, token, head) of each stream in
    turn.

    What is known of the rows' alignment does not survive the selection, and wide reads need it.
    """
    STREAMS: tl.constexpr = T.STREAMS
    ALIGN: tl.constexpr = T.ALIGN
    p_token = p_xs[0] + b * strides[0] + b_token * strides[1]
    p_rows = p_token[:, None] + (o_h * strides[2])[None, :]
    for s in tl.static_range(1, STREAMS):
        p_token = p_xs[s] + b * strides[3 * s] + b_token * strides[3 * s + 1]
        p_other = p_token[:, None] + (o_h * strides[3 * s + 2])[None, :]
        p_rows = tl.where((b_stream == s)[:, None], p_other, p_rows)
    return tl.multiple_of(p_rows, [ALIGN, ALIGN])[:, :, None]


@triton.jit
def load_pairs(p_rows, stride, m_rows, T: tl.constexpr):
    """Both numbers of each pair of rows (.., .., 1), as two float32 tiles (.., .., PAIRS).

    stride: between columns.
    """
    if T.INTERLEAVED:
        o_d = tl.arange(0, 2 * T.PAIRS)[None, None, :]
        b_x = tl.load(p_rows + o_d * stride, mask=m_rows & (o_d < T.D), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1], T.PAIRS, 2)))
    else:
        o_a = tl.arange(0, T.PAIRS)[None, None, :]
        o_b = o_a + (T.D + 1) // 2
        b_a = tl.load(p_rows + o_a * stride, mask=m_rows & (o_a < (T.D + 1) // 2), other=0.0)
        b_b = tl.load(p_rows + o_b * stride, mask=m_rows & (o_b < T.D), other=0.0)
        return b_a.to(tl.float32), b_b.to(tl.float32)


@triton.jit
def stored(b_x, DTYPE: tl.constexpr, T: tl.constexpr):
    EMULATE: tl.constexpr = T.EMULATE and tl.bfloat16 == DTYPE  # type: ignore[assignment]
    return rounded(b_x, DTYPE, EMULATE)


@triton.jit
def store_pairs(p_rows, b_a, b_b, m_rows, T: tl.constexpr):
    if T.INTERLEAVED:
        o_d = tl.arange(0, 2 * T.PAIRS)[None, None, :]
        b_x = tl.reshape(tl.join(b_a, b_b), (b_a.shape[0], b_a.shape[1], 2 * T.PAIRS))
        tl.store(p_rows + o_d, stored(b_x, p_rows.dtype.element_ty, T), mask=m_rows & (o_d < T.D))
    else:
        o_a = tl.arange(0, T.PAIRS)[None, None, :]
        o_b = o_a + (T.D + 1) // 2
        tl.store(p_rows + o_a, stored(b_a, p_rows.dtype.element_ty, T), mask=m_rows & (o_a < (T.D + 1) // 2))
        tl.store(p_rows + o_b, stored(b_b, p_rows.dtype.element_ty, T), mask=m_rows & (o_b < T.D))


@triton.jit
def load_tables(p_cos, p_sin, stride_tables, b_joined, m_t, T: tl.constexpr):
    """cos and then sin of the joined tokens, both numbers of each pair: four tiles (BLOCK_T, 1, PAIRS)"""
    m_rows = m_t[:, None, None]
    b_cos = load_pairs(p_cos + (b_joined * stride_tables[0])[:, None, None], stride_tables[1], m_rows, T)
    b_sin = load_pairs(p_sin + (b_joined * stride_tables[2])[:, None, None], stride_tables[3], m_rows, T)
    return b_cos[0], b_cos[1], b_sin[0], b_sin[1]


@triton.jit
def norm_factors(b_a, b_b, p_weights, stride_weights, b_stream, eps, T: tl.constexpr):
    """(1 / rms (BLOCK_T, BLOCK_H, 1), weight (BLOCK_T, 1, PAIRS) twice, whether normalised (BLOCK_T, 1, 1)).

    1 / rms and the weights are ones where a stream has none.
    """
    STREAMS: tl.constexpr = T.STREAMS
    m_all = tl.full([1, 1, 1], True, tl.int1)
    b_normed = tl.full([T.BLOCK_T, 1, 1], False, tl.int1)
    b_weight_a = tl.full([T.BLOCK_T, 1, T.PAIRS], 1.0, tl.float32)
    b_weight_b = b_weight_a
    for s in tl.static_range(STREAMS):
        if T.NORMED[s]:
            m_s = (b_stream == s)[:, None, None]
            p_row = p_weights[s] + tl.zeros([1, 1, 1], tl.int32)
            b_own_a, b_own_b = load_pairs(p_row, stride_weights[s], m_all, T)
            b_weight_a = tl.where(m_s, b_own_a, b_weight_a)
            b_weight_b = tl.where(m_s, b_own_b, b_weight_b)
            b_normed = b_normed | m_s
    b_r = tl.rsqrt(tl.sum(b_a * b_a + b_b * b_b, 2, keep_dims=True) / T.D + eps)
    return tl.where(b_normed, b_r, 1.0), b_weight_a, b_weight_b, b_normed


@triton.jit(do_not_specialize=["n_tokens", "n_total", "n_heads", "n_token_blocks", "n_head_blocks", "eps"])
def qk_norm_rope_kernel(
    p_xs,  # T.STREAMS: (B, tokens of the stream, H, D)
    p_weights,  # T.STREAMS: (D,) where T.NORMED
    p_offsets,  # T.STREAMS: (B, tokens of the stream, H, D) where T.SHIFTED
    p_cos,  # (all tokens, D), or None; also p_sin
    p_sin,
    p_permutation,  # (B, all tokens) int32 or int64, or None
    p_out,  # (B, all tokens, H, D), contiguous
    stride_xs,  # (item, token, head) of each stream in turn
    stride_weights,  # one per stream
    stride_offsets,  # (item, token, head, column) of each stream in turn; 0 broadcasts
    stride_tables,  # (token, column) of cos, then of sin
    stride_permutation,  # (item, token)
    n_tokens,  # one per stream
    n_total,
    n_heads,
    n_token_blocks,
    n_head_blocks,
    eps,
    T: tl.constexpr,
):
    STREAMS: tl.constexpr = T.STREAMS
    b = (tl.program_id(0) // n_head_blocks // n_token_blocks).to(tl.int64)
    o_t = tl.program_id(0) // n_head_blocks % n_token_blocks * T.BLOCK_T + tl.arange(0, T.BLOCK_T)
    o_h = tl.program_id(0) % n_head_blocks * T.BLOCK_H + tl.arange(0, T.BLOCK_H).to(tl.int64)
    b_joined, b_stream, b_token, m_t = place_tokens(
        p_permutation, stride_permutation, b, o_t, n_tokens, n_total, T
    )
    m_rows = m_t[:, None, None] & (o_h < n_heads)[None, :, None]
    b_a, b_b = load_pairs(stream_rows(p_xs, stride_xs, b, b_stream, b_token, o_h, T), 1, m_rows, T)
    if T.ANY_NORMED:
        b_r, b_weight_a, b_weight_b, _ = norm_factors(b_a, b_b, p_weights, stride_weights, b_stream, eps, T)
        b_a = b_a * b_r * b_weight_a
        b_b = b_b * b_r * b_weight_b
    for s in tl.static_range(STREAMS):
        if T.SHIFTED[s]:
            p_token = p_offsets[s] + b * stride_offsets[4 * s] + b_token * stride_offsets[4 * s + 1]
            p_rows = p_token[:, None, None] + (o_h * stride_offsets[4 * s + 2])[None, :, None]
            m_s = m_rows & (b_stream == s)[:, None, None]
            b_offset_a, b_offset_b = load_pairs(p_rows, stride_offsets[4 * s + 3], m_s, T)
            b_a += b_offset_a
            b_b += b_offset_b
    if p_cos is not None:
        b_cos_a, b_cos_b, b_sin_a, b_sin_b = load_tables(p_cos, p_sin, stride_tables, b_joined, m_t, T)
        b_turned = b_b * b_cos_b + b_a * b_sin_b
        b_a = b_a * b_cos_a - b_b * b_sin_a
        b_b = b_turned
    if p_permutation is not None:
        b_a = tl.where(m_t[:, None, None], b_a, float("nan"))
        b_b = tl.where(m_t[:, None, None], b_b, float("nan"))
    m_out = (o_t < n_total)[:, None, None] & (o_h < n_heads)[None, :, None]
    o_out = ((b * n_total + o_t)[:, None] * n_heads + o_h[None, :]) * T.D
    store_pairs((p_out + o_out)[:, :, None], b_a, b_b, m_out, T)


@triton.jit(
    do_not_specialize=[
        "n_tokens",
        "n_total",
        "n_heads",
        "n_token_blocks",
        "n_head_blocks",
        "n_blocks",
        "n_parts",
        "eps",
    ]
)
def qk_norm_rope_backward_kernel(
    p_dout,  # (B, all tokens, H, D)
    p_xs,
    p_weights,
    p_cos,
    p_sin,
    p_permutation,
    p_dxs,  # T.STREAMS: (B, tokens of the stream, H, D), contiguous
    p_doffsets,  # T.STREAMS: as p_dxs, in a dtype of its own, where T.SHIFTED
    p_partial,  # (programs, T.STREAMS, D) float32, or None
    stride_dout,  # (item, token, head)
    stride_xs,
    stride_dxs,  # as stride_xs
    stride_weights,
    stride_tables,
    stride_permutation,
    n_tokens,
    n_total,
    n_heads,
    n_token_blocks,
    n_head_blocks,
    n_blocks,  # of all items
    n_parts,  # programs
    eps,
    T: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two, at least T.STREAMS
):
    STREAMS: tl.constexpr = T.STREAMS
    ALIGN: tl.constexpr = T.ALIGN
    o_s = tl.arange(0, ROWS)
    b_dweight_a = tl.full([ROWS, T.PAIRS], 0.0, tl.float32)
    b_dweight_b = tl.full([ROWS, T.PAIRS], 0.0, tl.float32)
    for block in tl.range(tl.program_id(0), n_blocks, n_parts):
        b = tl.cast(block // n_head_blocks // n_token_blocks, tl.int64)
        o_t = block // n_head_blocks % n_token_blocks * T.BLOCK_T + tl.arange(0, T.BLOCK_T)
        o_h = block % n_head_blocks * T.BLOCK_H + tl.arange(0, T.BLOCK_H).to(tl.int64)
        b_joined, b_stream, b_token, m_t = place_tokens(
            p_permutation, stride_permutation, b, o_t, n_tokens, n_total, T
        )
        m_rows = m_t[:, None, None] & (o_h < n_heads)[None, :, None]
        p_token = p_dout + b * stride_dout[0] + o_t.to(tl.int64) * stride_dout[1]
        p_rows = tl.multiple_of(p_token[:, None] + (o_h * stride_dout[2])[None, :], [ALIGN, ALIGN])
        b_a, b_b = load_pairs(p_rows[:, :, None], 1, m_rows, T)
        if p_cos is not None:
            b_cos_a, b_cos_b, b_sin_a, b_sin_b = load_tables(p_cos, p_sin, stride_tables, b_joined, m_t, T)
            b_turned = b_b * b_cos_b - b_a * b_sin_a
            b_a = b_a * b_cos_a + b_b * b_sin_b
            b_b = b_turned
        p_dx = stream_rows(p_dxs, stride_dxs, b, b_stream, b_token, o_h, T)
        for s in tl.static_range(STREAMS):
            if T.SHIFTED[s]:
                p_token = p_doffsets[s] + b * stride_dxs[3 * s] + b_token * stride_dxs[3 * s + 1]
                p_rows = p_token[:, None, None] + (o_h * stride_dxs[3 * s + 2])[None, :, None]
                store_pairs(p_rows, b_a, b_b, m_rows & (b_stream == s)[:, None, None], T)
        if T.ANY_NORMED:
            b_x_a, b_x_b = load_pairs(
                stream_rows(p_xs, stride_xs, b, b_stream, b_token, o_h, T), 1, m_rows, T
            )
            b_r, b_weight_a, b_weight_b, b_normed = norm_factors(
                b_x_a, b_x_b, p_weights, stride_weights, b_stream, eps, T
            )
            if p_partial is not None:
                # Rows outside are 0, but their 1 / rms is infinite without eps.
                m_s = b_stream[:, None, None] == o_s[None, :, None]
                b_sum_a = tl.sum(tl.where(m_rows, b_a * b_x_a * b_r, 0.0), 1, keep_dims=True)
                b_sum_b = tl.sum(tl.where(m_rows, b_b * b_x_b * b_r, 0.0), 1, keep_dims=True)
                b_dweight_a += tl.sum(tl.where(m_s, b_sum_a, 0.0), 0)
                b_dweight_b += tl.sum(tl.where(m_s, b_sum_b, 0.0), 0)
            b_a = b_a * b_weight_a
            b_b = b_b * b_weight_b
            b_mean = tl.sum(b_a * b_x_a + b_b * b_x_b, 2, keep_dims=True) / T.D
            b_back = tl.where(b_normed, b_mean * b_r * b_r, 0.0)
            b_a = b_r * (b_a - b_x_a * b_back)
            b_b = b_r * (b_b - b_x_b * b_back)
        store_pairs(p_dx, b_a, b_b, m_rows, T)
    if p_partial is not None:
        p_row = p_partial + ((tl.program_id(0) * T.STREAMS + o_s) * T.D)[:, None, None]
        store_pairs(
            p_row, b_dweight_a[:, None, :], b_dweight_b[:, None, :], (o_s < T.STREAMS)[:, None, None], T
        )


@triton.jit(do_not_specialize=["n_parts"])
def sum_dweight_kernel(
    p_partial, p_dweights, n_parts, T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    STREAMS: tl.constexpr = T.STREAMS
    stream = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in tl.range(0, n_parts, BLOCK_N):
        o_n = i + tl.arange(0, BLOCK_N)
        o_partial = (o_n[:, None] * T.STREAMS + stream) * T.D + o_d[None, :]
        b_sums += tl.load(
            p_partial + o_partial, mask=(o_n < n_parts)[:, None] & (o_d < T.D)[None, :], other=0.0
        )
    b_dweight = tl.sum(b_sums, 0)
    for s in tl.static_range(STREAMS):
        if T.NORMED[s]:
            if stream == s:
                tl.store(
                    p_dweights[s] + o_d, stored(b_dweight, p_dweights[s].dtype.element_ty, T), mask=o_d < T.D
                )


def qk_norm_rope(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    offsets: Sequence[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    permutation: Tensor | None,
    out: Tensor,
    eps: float,
    half: bool,
    emulate: bool,
) -> None:
    """Launch the kernel; it writes out.

    xs: (B, tokens, H, D) of one dtype with contiguous columns.
    weights: (D,); offsets: (B, tokens, H, D); both of any float dtype and strides.
    cos, sin: (all tokens, D) float. permutation: (B, all tokens) int.
    out: (B, all tokens, H, D) contiguous, of at least one element.
    """
    batch, total, heads, _ = out.shape
    traits, warps = _traits(xs, weights, offsets, cos is not None and not half, emulate)
    token_blocks, head_blocks = triton.cdiv(total, traits.BLOCK_T), triton.cdiv(heads, traits.BLOCK_H)
    qk_norm_rope_kernel[(batch * token_blocks * head_blocks,)](
        tuple(xs),
        _filled(weights, xs),
        _filled(offsets, xs),
        cos,
        sin,
        permutation,
        out,
        stride_xs=_row_strides(xs),
        stride_weights=tuple(0 if w is None else w.stride(0) for w in weights),
        stride_offsets=tuple(i for t in offsets for i in ((0,) * 4 if t is None else t.stride())),
        stride_tables=_table_strides(cos, sin),
        stride_permutation=(0, 0) if permutation is None else permutation.stride(),
        n_tokens=tuple(x.shape[1] for x in xs),
        n_total=total,
        n_heads=heads,
        n_token_blocks=token_blocks,
        n_head_blocks=head_blocks,
        eps=eps,
        T=traits,
        num_warps=warps,
        enable_fp_fusion=True,
    )


def qk_norm_rope_backward(
    dout: Tensor,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    permutation: Tensor | None,
    dxs: Sequence[Tensor],
    dweights: Sequence[Tensor | None],
    doffsets: Sequence[Tensor | None],
    eps: float,
    half: bool,
    emulate: bool,
) -> None:
    """Launch the kernels; they write dxs, and dweights and doffsets where they are given.

    dout: as out, with contiguous columns. dxs: as xs, contiguous.
    dweights: (D,) contiguous, for all streams that have a weight or for none.
    doffsets: (B, tokens, H, D) contiguous, the gradient of an offset of x's shape.
    The rest as in qk_norm_rope.
    """
    batch, total, heads, dim = dout.shape
    traits, warps = _traits([dout, *xs, *dxs], weights, doffsets, cos is not None and not half, emulate)
    token_blocks, head_blocks = triton.cdiv(total, traits.BLOCK_T), triton.cdiv(heads, traits.BLOCK_H)
    parts = blocks = batch * token_blocks * head_blocks
    partial = None
    if any(t is not None for t in dweights):
        # Each has its own sums, in an order that depends on the shapes alone.
        parts = triton.cdiv(blocks, triton.cdiv(blocks, MOST_PARTS))
        partial = torch.empty(parts, len(xs), dim, dtype=torch.float32, device=dout.device)
    qk_norm_rope_backward_kernel[(parts,)](
        dout,
        tuple(xs),
        _filled(weights, xs),
        cos,
        sin,
        permutation,
        tuple(dxs),
        _filled(doffsets, dxs),
        partial,
        stride_dout=dout.stride()[:3],
        stride_xs=_row_strides(xs),
        stride_dxs=_row_strides(dxs),
        stride_weights=tuple(0 if w is None else w.stride(0) for w in weights),
        stride_tables=_table_strides(cos, sin),
        stride_permutation=(0, 0) if permutation is None else permutation.stride(),
        n_tokens=tuple(x.shape[1] for x in xs),
        n_total=total,
        n_heads=heads,
        n_token_blocks=token_blocks,
        n_head_blocks=head_blocks,
        n_blocks=blocks,
        n_parts=parts,
        eps=eps,
        T=traits,
        ROWS=triton.next_power_of_2(len(xs)),
        num_warps=warps,
        enable_fp_fusion=True,
    )
    if partial is not None:
        # 16 columns are 64 bytes of a row: enough programs for the rows of one weight, few enough turns for
        # each.
        sum_dweight_kernel[(len(xs), triton.cdiv(dim, 16))](
            partial, _filled(dweights, xs), parts, T=traits, BLOCK_N=256, BLOCK_D=16, num_warps=4
        )


def _traits(
    tensors: Sequence[Tensor], weights, shifts, interleaved: bool, emulate: bool
) -> tuple[Traits, int]:
    heads, dim = tensors[0].shape[2:]
    blocks = norm_rope_blocks(heads, dim)
    normed, shifted = (tuple(t is not None for t in given) for given in (weights, shifts))
    align = math.gcd(16, *(address for t in tensors for address in _addresses(t)))
    traits = Traits(
        D=dim,
        STREAMS=len(normed),
        INTERLEAVED=interleaved,
        NORMED=normed,
        ANY_NORMED=any(normed),
        SHIFTED=shifted,
        BLOCK_T=blocks.tokens,
        BLOCK_H=blocks.heads,
        PAIRS=blocks.pairs,
        ALIGN=align,
        EMULATE=emulate,
    )
    return traits, blocks.warps


def _addresses(t: Tensor) -> list[int]:
    """The first row's, and the steps to all others, in bytes"""
    steps = [
        stride * t.element_size()
        for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)
        if size > 1
    ]
    return [t.data_ptr(), *steps] if t.numel() else []


def _filled(tensors: Sequence[Tensor | None], xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A pointer for every stream: x's own where there is nothing to point to, which the kernel does not
    follow.
    """
    return tuple(x if t is None else t for t, x in zip(tensors, xs, strict=True))


def _row_strides(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(i for t in tensors for i in t.stride()[:3])


def _table_strides(cos: Tensor | None, sin: Tensor | None) -> tuple[int, ...]:
    return (0,) * 4 if cos is None or sin is None else (*cos.stride(), *sin.stride())

"""query_blur: a matrix applied along one side of a grid of tokens; a blur is one pass along each side.

Verified in Triton's interpreter and compiled for sm_80 and sm_90; not yet run on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .segments import rounded

BLOCK_J, BLOCK_C = 32, 64


@triton.jit
def blur_side_kernel(
    p_y,
    p_x,
    p_matrix,
    stride_y,
    stride_x,
    n_lines,
    n_heads,
    n_side,
    n_columns,
    n_blocks_i,
    n_blocks_c,
    radius,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    pid = tl.program_id(0)
    c = pid % n_blocks_c * BLOCK_C
    pid = pid // n_blocks_c
    i = pid % n_blocks_i * BLOCK_I
    pid = pid // n_blocks_i
    h = (pid % n_heads).to(tl.int64)
    line = (pid // n_heads % n_lines).to(tl.int64)
    b = (pid // n_heads // n_lines).to(tl.int64)
    o_i = i + tl.arange(0, BLOCK_I)
    o_c = c + tl.arange(0, BLOCK_C)
    m_i = (o_i < n_side)[:, None]
    m_c = (o_c < n_columns)[None, :]
    p_x += b * stride_x[0] + line * stride_x[1] + h * stride_x[3]
    p_x += o_c[None, :] * stride_x[4]
    b_y = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    # the matrix is zero farther than radius from its diagonal; whole blocks keep its rows aligned
    first = tl.maximum(i - radius, 0) // BLOCK_J * BLOCK_J
    end = tl.minimum(i + BLOCK_I + radius, n_side)
    for j in range(first, end, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        m_j = o_j < n_side
        b_m = tl.load(p_matrix + o_i[:, None] * n_side + o_j[None, :], mask=m_i & m_j[None, :], other=0.0)
        p_tile = p_x + o_j.to(tl.int64)[:, None] * stride_x[2]
        b_x = tl.load(p_tile, mask=m_j[:, None] & m_c, other=0.0).to(tl.float32)
        b_y = tl.dot(b_m, b_x, b_y, input_precision=PRECISION)
    p_y += b * stride_y[0] + line * stride_y[1] + h * stride_y[3]
    p_y += o_i.to(tl.int64)[:, None] * stride_y[2] + o_c[None, :] * stride_y[4]
    tl.store(p_y, rounded(b_y, p_y.dtype.element_ty, EMULATE), mask=m_i & m_c)


def blur_side(y: Tensor, x: Tensor, matrix: Tensor, radius: int, precision: str, emulate: bool) -> None:
    """y = matrix @ x along the third dimension of (batch, lines, side, heads, dim), of any strides.

    matrix (side, side) float32, contiguous, zero farther than `radius` from its diagonal; y and x float32,
    bfloat16 or float16, not necessarily the same; float32 products, of `precision` as tl.dot's
    input_precision.
    """
    batch, lines, side, heads, dim = x.shape
    stride_y, stride_x = list(y.stride()), list(x.stride())
    if all(strides[3] == dim * strides[4] for strides in (stride_y, stride_x)):
        heads, dim = 1, heads * dim
    block_i = min(64, max(16, triton.next_power_of_2(side)))
    blocks_i, blocks_c = triton.cdiv(side, block_i), triton.cdiv(dim, BLOCK_C)
    blur_side_kernel[(batch * lines * heads * blocks_i * blocks_c,)](
        y,
        x,
        matrix,
        tuple(stride_y),
        tuple(stride_x),
        lines,
        heads,
        side,
        dim,
        blocks_i,
        blocks_c,
        radius,
        BLOCK_I=block_i,
        BLOCK_J=BLOCK_J,
        BLOCK_C=BLOCK_C,
        PRECISION=precision,
        EMULATE=emulate,
        num_warps=4,
    )

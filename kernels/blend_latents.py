"""blend_latents in one pass: the known part on the line from source to noise, the mask over it.

Verified in Triton's interpreter and compiled for sm_80 and sm_90; not yet run on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .segments import rounded
from .strides import Walk, collapse, offsets

MOST_DIMS = 4
BLOCK = 1024


@triton.jit
def blend_latents_kernel(
    p_out,
    p_generated,
    p_source,
    p_noise,
    p_mask,
    p_sigma,
    sigma,
    sizes,
    s_out,
    s_generated,
    s_source,
    s_noise,
    s_mask,
    s_sigma,
    n,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BINARY: tl.constexpr,
    EMULATE: tl.constexpr,
):
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    first = tl.program_id(0) * BLOCK
    if WIDE:
        first = tl.program_id(0).to(tl.int64) * BLOCK
    o = first + tl.arange(0, BLOCK)
    m = o < n
    b_generated = tl.load(p_generated + offsets(o, sizes, s_generated, DIMS), mask=m)
    b_mask = tl.load(p_mask + offsets(o, sizes, s_mask, DIMS), mask=m, other=0)
    # without one of the ends, the other is the known part
    if p_noise is None:
        b_known = tl.load(p_source + offsets(o, sizes, s_source, DIMS), mask=m)
        b_line = b_known.to(tl.float32)
    elif p_source is None:
        b_known = tl.load(p_noise + offsets(o, sizes, s_noise, DIMS), mask=m)
        b_line = b_known.to(tl.float32)
    else:
        b_source = tl.load(p_source + offsets(o, sizes, s_source, DIMS), mask=m)
        b_noise = tl.load(p_noise + offsets(o, sizes, s_noise, DIMS), mask=m)
        if p_sigma is None:
            b_line = (1.0 - sigma) * b_source.to(tl.float32) + sigma * b_noise.to(tl.float32)
            b_known = rounded(b_line, DTYPE, EMULATE)
        else:
            b_sigma = tl.load(p_sigma + offsets(o, sizes, s_sigma, DIMS), mask=m, other=0.0).to(tl.float32)
            b_line = (1.0 - b_sigma) * b_source.to(tl.float32) + b_sigma * b_noise.to(tl.float32)
            # picked, not computed: noise may be anything where it does not count
            b_line = tl.where(b_sigma == 0, b_source.to(tl.float32), b_line)
            b_line = tl.where(b_sigma == 1, b_noise.to(tl.float32), b_line)
            b_known = rounded(b_line, DTYPE, EMULATE)
            b_known = tl.where(b_sigma == 0, b_source, tl.where(b_sigma == 1, b_noise, b_known))
    if BINARY:
        b_out = tl.where(b_mask != 0, b_generated, b_known)
    else:
        b_share = b_mask.to(tl.float32)
        b_wide = b_generated.to(tl.float32)
        # from the nearer end, so that the ends and equal values are exact
        b_near = b_line + b_share * (b_wide - b_line)
        b_mixed = tl.where(b_share < 0.5, b_near, b_wide - (1.0 - b_share) * (b_wide - b_line))
        b_out = rounded(b_mixed, DTYPE, EMULATE)
        b_out = tl.where(b_share == 1, b_generated, tl.where(b_share == 0, b_known, b_out))
    tl.store(p_out + offsets(o, sizes, s_out, DIMS), b_out, mask=m)


def walk(
    out: Tensor, generated: Tensor, source: Tensor, noise: Tensor, mask: Tensor, sigma: Tensor | None
) -> Walk:
    """The dimensions that the six have in common; sigma () or (1|batch,)."""
    shape = tuple(out.shape)
    strides = [t.expand(shape).stride() for t in (out, generated, source, noise, mask)]
    if sigma is None:
        strides.append((0,) * len(shape))
    else:
        strides.append(sigma.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).stride())
    return collapse(shape, *strides)


def blend_latents(
    out: Tensor,
    generated: Tensor,
    source: Tensor,
    noise: Tensor,
    mask: Tensor,
    sigma: float | Tensor,
    emulate: bool,
) -> None:
    """out = generated where mask is 1, elsewhere (1 - sigma) * source + sigma * noise; mixed linearly
    between.

    out and generated (batch, ...) of one shape, float32, bfloat16 or float16; source, noise and mask
    broadcast to it, the mask bool or floating point; sigma a number, or floating point () or (1|batch,).
    walk() must give no more than MOST_DIMS dimensions.
    """
    level = sigma if isinstance(sigma, Tensor) else None
    sizes, strides, wide = walk(out, generated, source, noise, mask, level)
    binary = not mask.dtype.is_floating_point
    number = 0.5 if isinstance(sigma, Tensor) else float(sigma)
    n = out.numel()
    blend_latents_kernel[(triton.cdiv(n, BLOCK),)](
        out,
        generated,
        None if number == 1 else source,
        None if number == 0 else noise,
        mask,
        level,
        number,
        sizes,
        *strides,
        n,
        DIMS=len(sizes),
        BLOCK=BLOCK,
        WIDE=wide,
        BINARY=binary,
        EMULATE=emulate,
        num_warps=4,
    )

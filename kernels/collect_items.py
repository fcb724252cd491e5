"""Gradients of items that several output items read, summed in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .segments import rounded


@triton.jit(do_not_specialize=["n_items", "n_numbers"])
def collect_items_kernel(
    p_grads, p_source, p_out, n_items, n_numbers, BLOCK: tl.constexpr, EMULATE: tl.constexpr
):
    t = tl.program_id(1)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for b in range(0, n_items):
        mine = True
        if p_source is not None:
            mine = tl.load(p_source + b) == t
        if mine:
            b_sum += tl.load(p_grads + tl.cast(b, tl.int64) * n_numbers + o, mask=o < n_numbers, other=0.0)
    tl.store(
        p_out + t.to(tl.int64) * n_numbers + o,
        rounded(b_sum, p_out.dtype.element_ty, EMULATE),
        mask=o < n_numbers,
    )


def collect_items(grads: Tensor, source: Tensor | None, out: Tensor, emulate: bool) -> None:
    """out[t] = sum of grads[b] over the output items b that read item t, in their order.

    grads (B, ...) float32 and out (batch, ...), contiguous; source (B,) int64: what each output item read,
    None: the only one.
    """
    numbers = out[0].numel()
    collect_items_kernel[(triton.cdiv(numbers, 1024), out.shape[0])](
        grads, source, out, grads.shape[0], numbers, BLOCK=1024, EMULATE=emulate, num_warps=4
    )

"""Calls of blend_latents, adain and query_blur in Triton, to be compiled for GPUs that are not present.

Sizes and strides are those of hosts: FLUX's packed latents and queries, SDXL's latents in both formats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashbrush.bindings.backends.triton import (
    adain as triton_adain,
    blend_latents as triton_blend,
    query_blur as triton_query_blur,
)


def _blend(dtype: torch.dtype, shape: tuple[int, ...], mask: Tensor, sigma: float | Tensor) -> Tensor:
    generated, source, noise = (torch.zeros(shape, dtype=dtype) for _ in range(3))
    return triton_blend.blend_latents(generated, source[:1], noise[:1], mask, sigma)


def _adain(dtype: torch.dtype, batch: int, masked: bool, memory_format: torch.memory_format) -> Tensor:
    x, style = (torch.zeros(n, 4, 128, 128, dtype=dtype).to(memory_format=memory_format) for n in (batch, 1))
    masks = [torch.ones(1, 1, 128, 128, dtype=torch.bool) if masked else None for _ in range(2)]
    return triton_adain.adain(x, style, *masks, 1e-5)


def _query_blur(dtype: torch.dtype, side: int, text: int, contiguous_heads: bool) -> Tensor:
    q = torch.zeros(1, text + side * side, 4, 128, dtype=dtype)
    if not contiguous_heads:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    return triton_query_blur.query_blur(q, text, torch.eye(side), torch.eye(side), (side // 2 - 1, 3))


SMALL_OPERATOR_CALLS: dict[str, Callable[[torch.dtype], object]] = {
    "blend_latents bool mask, number": lambda dtype: _blend(
        dtype, (2, 4096, 64), torch.ones(1, 4096, 1) > 0, 0.3
    ),
    "blend_latents bool mask, last step": lambda dtype: _blend(
        dtype, (2, 4096, 64), torch.ones(1, 4096, 1) > 0, 0.0
    ),
    "blend_latents soft mask, per item": lambda dtype: _blend(
        dtype, (2, 4, 128, 128), torch.ones(1, 1, 128, 128), torch.ones(2)
    ),
    "adain": lambda dtype: _adain(dtype, 2, False, torch.contiguous_format),
    "adain masked, channels last": lambda dtype: _adain(dtype, 1, True, torch.channels_last),
    "query_blur": lambda dtype: _query_blur(dtype, 64, 0, True),
    "query_blur behind text, heads apart": lambda dtype: _query_blur(dtype, 32, 512, False),
}

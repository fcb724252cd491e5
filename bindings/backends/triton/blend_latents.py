"""blend_latents in Triton: one read of each input and one write."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu.device import on_device
from ..gpu.eligibility import emulated, tensor_reasons


def why_not(
    generated: Tensor, source: Tensor, noise: Tensor, mask: Tensor, sigma: float | Tensor
) -> list[str]:
    if reasons := tensor_reasons(generated):
        return reasons
    fits = walkable(generated, source, noise, mask, sigma)
    return [] if fits else ["strides that do not fold into few dimensions"]


def walkable(generated: Tensor, source: Tensor, noise: Tensor, mask: Tensor, sigma: float | Tensor) -> bool:
    """Whether the strides of all inputs fold into the few dimensions that the kernel has."""
    from ....kernels.blend_latents import MOST_DIMS, walk

    level = sigma if isinstance(sigma, Tensor) else None
    return len(walk(torch.empty_like(generated), generated, source, noise, mask, level).sizes) <= MOST_DIMS


def blend_latents(
    generated: Tensor, source: Tensor, noise: Tensor, mask: Tensor, sigma: float | Tensor
) -> Tensor:
    """As the public function, whose checked arguments these are."""
    from ....kernels.blend_latents import blend_latents as launch

    out = torch.empty_like(generated)
    if out.numel():
        # a bool pointer is one of single bits in Triton
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        with on_device(out):
            launch(out, generated, source, noise, mask, sigma, emulated(out))
    return out

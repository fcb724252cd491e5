"""blend_latents from torch's operators, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def blend_latents(
    generated: Tensor, source: Tensor, noise: Tensor, mask: Tensor, sigma: float | Tensor
) -> Tensor:
    """Any dtype, differentiable in everything."""
    wide = torch.promote_types(generated.dtype, torch.float32)
    if isinstance(sigma, Tensor):
        # (batch, 1, ..., 1). At 0 and 1 the result is picked, not computed: the other term may hold NaN.
        level = sigma.to(generated.device, wide).reshape(-1, *[1] * (generated.dim() - 1))
        known = ((1 - level) * source.to(wide) + level * noise.to(wide)).to(generated.dtype)
        known = torch.where(level == 0, source, torch.where(level == 1, noise, known))
    elif sigma in (0, 1):
        known = noise if sigma else source
    else:
        known = ((1 - sigma) * source.to(wide) + sigma * noise.to(wide)).to(generated.dtype)
    if mask.dtype == torch.bool:
        return torch.where(mask, generated, known)
    mixed = torch.lerp(known.to(wide), generated.to(wide), mask.to(wide)).to(generated.dtype)
    return torch.where(mask == 1, generated, torch.where(mask == 0, known, mixed))

"""adain from torch's operators, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def adain(x: Tensor, style: Tensor, mask: Tensor | None, style_mask: Tensor | None, eps: float) -> Tensor:
    """Any dtype, differentiable in x and style."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, std = _statistics(x.to(wide), mask, eps)
    space = [1] * (x.dim() - 2)  # the style may have other dimensions than x
    style_mean, style_std = (
        t.reshape(*t.shape[:2], *space) for t in _statistics(style.to(wide), style_mask, eps)
    )
    result = ((x.to(wide) - mean) / std * style_std + style_mean).to(x.dtype)
    return result if mask is None else torch.where(mask, result, x)


def _statistics(x: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation, each (batch, channels, 1, ..., 1)."""
    space = tuple(range(2, x.dim()))
    if mask is None:
        variance, mean = torch.var_mean(x, dim=space, keepdim=True, correction=1)
        return mean, (variance + eps).sqrt()
    count = mask.sum(dim=space, keepdim=True)  # (batch or 1, 1, 1, ...)
    mean = torch.where(mask, x, 0).sum(dim=space, keepdim=True) / count
    variance = torch.where(mask, x - mean, 0).square().sum(dim=space, keepdim=True) / (count - 1)
    return mean, (variance + eps).sqrt()

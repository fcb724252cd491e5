"""adain(): adaptive instance normalisation, the mean and deviation of one image given to another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends.triton import adain as triton_adain
from .core.autograd import has_tangent

EPS = 1e-5  # added to the variance, before the root
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adain(x: Tensor, style: Tensor, mask: Tensor | None = None, style_mask: Tensor | None = None) -> Tensor:
    """x with each channel's mean and deviation replaced by those of `style`.

        (x - mean(x)) / std(x) * std(style) + mean(style),    std = sqrt(unbiased variance + 1e-5)

    over the spatial dimensions of each item and channel. With masks the statistics are those inside each
    mask, and x is unchanged outside of its own. Cross-image attention (arXiv 2311.03335) and SD-VICL (arXiv
    2508.09949) use it on latents; the formula is Huang and Belongie's (arXiv 1703.06868).

    Args:
        x: (batch, channels, ...) with at least one spatial dimension; float32, bfloat16, float16 or float64.
        style: (batch or 1, channels, ...) of x's dtype and device; its spatial dimensions may differ from
            x's.
        mask: bool, (batch or 1, 1, ...) over x's spatial dimensions; None: everywhere.
        style_mask: the same for style. With only one of the masks, the other image counts whole.

    Returns:
        A new tensor of x's shape and dtype; computed in float32 at least, and the same bitwise from run to
        run. On a GPU without gradients Triton kernels make it; else it is made of torch operators, which are
        differentiable.

    Raises:
        TypeError: dtypes or devices that differ, a mask that is not bool.
        ValueError: shapes that do not fit; fewer than two elements to take a variance of (masks: on the CPU).
    """
    _check(x, style)
    mask = _check_mask("mask", mask, "x", x)
    style_mask = _check_mask("style_mask", style_mask, "style", style)
    if has_tangent(x, style) or (torch.is_grad_enabled() and (x.requires_grad or style.requires_grad)):
        return composed(x, style, mask, style_mask)
    return _adain(x, style, mask, style_mask)


def composed(x: Tensor, style: Tensor, mask: Tensor | None, style_mask: Tensor | None) -> Tensor:
    """The same from torch operators: any device and dtype, differentiable in x and style."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, std = _statistics(x.to(wide), mask)
    space = [1] * (x.dim() - 2)  # the style may have other dimensions than x
    style_mean, style_std = (t.reshape(*t.shape[:2], *space) for t in _statistics(style.to(wide), style_mask))
    result = ((x.to(wide) - mean) / std * style_std + style_mean).to(x.dtype)
    return result if mask is None else torch.where(mask, result, x)


def _statistics(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation, each (batch, channels, 1, ..., 1)."""
    space = tuple(range(2, x.dim()))
    if mask is None:
        variance, mean = torch.var_mean(x, dim=space, keepdim=True, correction=1)
        return mean, (variance + EPS).sqrt()
    count = mask.sum(dim=space, keepdim=True)  # (batch or 1, 1, 1, ...)
    mean = torch.where(mask, x, 0).sum(dim=space, keepdim=True) / count
    variance = torch.where(mask, x - mean, 0).square().sum(dim=space, keepdim=True) / (count - 1)
    return mean, (variance + EPS).sqrt()


def _run(x: Tensor, style: Tensor, mask: Tensor | None, style_mask: Tensor | None) -> Tensor:
    if triton_adain.usable(x, style, mask, style_mask):
        return triton_adain.adain(x, style, mask, style_mask, EPS)
    # in the layout that the fake promises to a compiler
    result = composed(x, style, mask, style_mask)
    out = torch.empty_like(x)
    return result if result.stride() == out.stride() else out.copy_(result)


def _fake(x: Tensor, *rest) -> Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("flashbrush", "FRAGMENT")
_library.define("adain(Tensor x, Tensor style, Tensor? mask, Tensor? style_mask) -> Tensor")
_library.impl("adain", _run, "CompositeExplicitAutograd")
torch.library.register_fake("flashbrush::adain", _fake, lib=_library)
_adain = torch.ops.flashbrush.adain.default


def _check(x: Tensor, style: Tensor) -> None:
    for name, t in (("x", x), ("style", style)):
        if not isinstance(t, Tensor) or t.dtype not in _FLOATS:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if t.dim() < 3:
            raise ValueError(f"{name}: expected shape (batch, channels, ...), got {tuple(t.shape)}")
        if math.prod(t.shape[2:]) < 2:
            raise ValueError(f"{name}: expected at least 2 elements per channel, got shape {tuple(t.shape)}")
    if style.dtype != x.dtype:
        raise TypeError(f"style: expected x's dtype {x.dtype}, got {style.dtype}")
    if style.device != x.device:
        raise TypeError(f"style: expected x's device {x.device}, got {style.device}")
    if style.shape[0] not in (1, x.shape[0]) or style.shape[1] != x.shape[1]:
        got = tuple(style.shape)
        raise ValueError(f"style: expected {x.shape[0]} or 1 items of {x.shape[1]} channels, got shape {got}")


def _check_mask(name: str, mask: Tensor | None, image: str, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}")
    if mask.device != x.device:
        raise TypeError(f"{name}: expected {image}'s device {x.device}, got {mask.device}")
    space = tuple(x.shape[2:])
    if mask.dim() != x.dim() or mask.shape[0] not in (1, x.shape[0]) or mask.shape[1:] != (1, *space):
        expected = f"({x.shape[0]} or 1, 1, {', '.join(map(str, space))})"
        raise ValueError(f"{name}: expected shape {expected} for {image}, got {tuple(mask.shape)}")
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        least = int(mask.flatten(1).sum(1).min()) if mask.shape[0] else 2
        if least < 2:
            raise ValueError(f"{name}: expected at least 2 elements of each item to be True, got {least}")
    return mask

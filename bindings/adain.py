"""adain(): adaptive instance normalisation, the mean and deviation of one image given to another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends.composed.adain import adain as composed
from .backends.planner import check_name
from .core.autograd import has_tangent
from .operators.adain import EPS, adain as operator

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adain(
    x: Tensor,
    style: Tensor,
    mask: Tensor | None = None,
    style_mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """x with each channel's mean and deviation replaced by those of `style`.

        (x - mean(x)) / std(x) * std(style) + mean(style)        std = sqrt(unbiased variance + 1e-5)

    over the spatial dimensions of each item and channel. With masks, the statistics are those inside each
    mask, and x is unchanged outside its own. The formula is Huang and Belongie's (arXiv 1703.06868);
    cross-image attention (arXiv 2311.03335) and SD-VICL (arXiv 2508.09949) use it on latents. Differentiable
    in x and style.

    Args:
        x: (batch, channels, ...) with at least one spatial dimension; float32, bfloat16, float16 or float64.
        style: (batch or 1, channels, ...) of x's dtype and device; its spatial dimensions may differ from
            x's.
        mask: bool (batch or 1, 1, ...) over x's spatial dimensions. None: everywhere.
        style_mask: the same for style. With only one mask, the other image counts as a whole.
        backend: "auto", or a name of backends(). A named one raises with its reasons rather than fall back.

    Returns:
        A new tensor of x's shape and dtype, computed in float32 at least, the same bitwise from run to run.
        On a GPU without gradients Triton kernels make it.

    Raises:
        TypeError: dtypes or devices that differ, a mask that is not bool.
        ValueError: shapes that do not fit; fewer than two elements for a variance (masks: checked on the
            CPU).

    Examples:
        >>> import torch, flashbrush as fb
        >>> x, style = torch.randn(1, 4, 8, 8), 3 + 2 * torch.randn(1, 4, 16, 16)
        >>> torch.allclose(fb.adain(x, style).mean((2, 3)), style.mean((2, 3)), atol=1e-4)
        True
    """
    _check(x, style)
    mask = _check_mask("mask", mask, "x", x)
    style_mask = _check_mask("style_mask", style_mask, "style", style)
    check_name(backend)
    if has_tangent(x, style) or (torch.is_grad_enabled() and (x.requires_grad or style.requires_grad)):
        return composed(x, style, mask, style_mask, EPS)
    return operator(x, style, mask, style_mask, backend=backend)


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

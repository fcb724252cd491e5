"""blend_latents(): keep the known part of an image along a flow-matching trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.composed.blend_latents import blend_latents as composed
from .backends.planner import check_name
from .core.autograd import has_tangent
from .operators.blend_latents import blend_latents as operator

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def blend_latents(
    generated: Tensor,
    source: Tensor,
    noise: Tensor,
    mask: Tensor,
    sigma: float | Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Latents that are `generated` where the mask is 1, and the source at noise level `sigma` elsewhere.

        mask * generated + (1 - mask) * ((1 - sigma) * source + sigma * noise)

    Called after every step with the sigma that the step has just reached, and with the same noise throughout,
    it keeps the known part on the straight line of flow matching that ends in the source. Where mask is 1 the
    result equals `generated` bitwise; where mask and sigma are 0 it equals `source` bitwise. This is the
    token blending of In-Context Brush (arXiv 2505.20271) with the interpolation of rectified flow.
    Differentiable in everything.

    Args:
        generated: (batch, ...), spatial or packed; float32, bfloat16, float16 or float64.
        source: clean latents of generated's shape (batch 1 broadcasts), dtype and device.
        noise: the run's fixed noise, as source.
        mask: broadcastable to generated's shape; bool, or floating point in [0, 1] (linear in between).
        sigma: noise level in [0, 1]: a number, or a floating-point tensor () or (batch,).
        backend: "auto", or a name of backends(). A named one raises with its reasons rather than fall back.

    Returns:
        A new tensor of generated's shape and dtype, computed in float32 at least. On a GPU without gradients
        one Triton kernel makes it in one pass, without waiting for the device.

    Raises:
        TypeError: dtypes or devices that differ, a mask that is neither bool nor floating point.
        ValueError: shapes that do not fit; a mask or sigma outside [0, 1] (checked for numbers and CPU
            tensors).

    Examples:
        >>> import torch, flashbrush as fb
        >>> generated, source, noise = torch.randn(3, 1, 4, 8, 8)
        >>> hole = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
        >>> torch.equal(fb.blend_latents(generated, source, noise, hole, sigma=0.0), source)
        True
    """
    _check_latents(generated, source, noise)
    _check_mask(mask, generated)
    sigma = _check_sigma(sigma, generated)
    check_name(backend)
    tensors = (generated, source, noise, mask, sigma)
    learns = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
    if learns or has_tangent(*tensors):
        return composed(generated, source, noise, mask, sigma)
    if isinstance(sigma, Tensor) and not _readable_number(sigma, generated):
        return operator(generated, source, noise, mask, sigma.to(generated.device), 0.0, backend=backend)
    return operator(generated, source, noise, mask, None, float(sigma), backend=backend)


def _readable_number(sigma: Tensor, generated: Tensor) -> bool:
    """One number on the CPU for latents on a device: it is read, as copying it would wait for the device."""
    elsewhere = sigma.device.type == "cpu" != generated.device.type
    return elsewhere and sigma.numel() == 1 and not torch.compiler.is_compiling()


def _check_latents(generated: Tensor, source: Tensor, noise: Tensor) -> None:
    if not isinstance(generated, Tensor) or generated.dtype not in _FLOATS:
        got = generated.dtype if isinstance(generated, Tensor) else type(generated).__name__
        raise TypeError(f"generated: expected a floating-point tensor, got {got}")
    if generated.dim() == 0:
        raise ValueError("generated: expected shape (batch, ...), got a tensor without dimensions")
    for name, t in (("source", source), ("noise", noise)):
        if not isinstance(t, Tensor) or t.dtype != generated.dtype:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected generated's dtype {generated.dtype}, got {got}")
        if t.device != generated.device:
            raise TypeError(f"{name}: expected generated's device {generated.device}, got {t.device}")
        fits = t.dim() == generated.dim() and t.shape[0] in (1, generated.shape[0])
        if not fits or t.shape[1:] != generated.shape[1:]:
            raise ValueError(
                f"{name}: expected generated's shape {tuple(generated.shape)}, got {tuple(t.shape)}"
            )


def _check_mask(mask: Tensor, generated: Tensor) -> None:
    if not isinstance(mask, Tensor) or (mask.dtype != torch.bool and mask.dtype not in _FLOATS):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool or floating-point tensor, got {got}")
    if mask.device != generated.device:
        raise TypeError(f"mask: expected generated's device {generated.device}, got {mask.device}")
    shape = (1,) * (generated.dim() - mask.dim()) + tuple(mask.shape)
    if len(shape) != generated.dim() or any(
        a not in (1, b) for a, b in zip(shape, generated.shape, strict=True)
    ):
        want, got = tuple(generated.shape), tuple(mask.shape)
        raise ValueError(f"mask: expected a shape broadcastable to generated's {want}, got {got}")
    readable = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if mask.dtype != torch.bool and readable and mask.numel() and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(f"mask: expected values in [0, 1], got {float(mask.min()):g}..{float(mask.max()):g}")


def _check_sigma(sigma: float | Tensor, generated: Tensor) -> float | Tensor:
    if not isinstance(sigma, Tensor):
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
            raise TypeError(f"sigma: expected a number or a tensor, got {type(sigma).__name__}")
        if not 0 <= sigma <= 1:  # NaN too
            raise ValueError(f"sigma: expected a noise level in [0, 1], got {sigma}")
        return sigma
    if not sigma.dtype.is_floating_point:
        raise TypeError(f"sigma: expected a floating-point tensor, got {sigma.dtype}")
    if sigma.dim() > 1 or (sigma.dim() == 1 and sigma.shape[0] not in (1, generated.shape[0])):
        raise ValueError(f"sigma: expected shape () or ({generated.shape[0]},), got {tuple(sigma.shape)}")
    readable = sigma.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool(((sigma >= 0) & (sigma <= 1)).all()):
        raise ValueError(f"sigma: expected noise levels in [0, 1], got {sigma.tolist()}")
    return sigma

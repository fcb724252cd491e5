"""blend_latents(): keep the known part of an image along a flow-matching trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.triton import blend_latents as triton_blend
from .core.autograd import has_tangent

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def blend_latents(
    generated: Tensor, source: Tensor, noise: Tensor, mask: Tensor, sigma: float | Tensor
) -> Tensor:
    """Latents that are `generated` where mask is 1 and, elsewhere, the source at noise level `sigma`.

    The known part is the straight line of flow matching, (1 - sigma) * source + sigma * noise. Called after
    every step with the sigma which that step has just reached, and with one and the same noise, it keeps the
    known part on the line that ends in the source: where mask is 0 and sigma is 0 the result equals `source`
    bitwise, where mask is 1 it equals `generated` bitwise. In-Context Brush (arXiv 2505.20271, token
    blending), with the interpolation of rectified flow.

    Args:
        generated: (batch, ...), of any rank, spatial or packed; float32, bfloat16, float16 or float64.
        source, noise: clean latents and the run's fixed noise, of generated's shape (batch 1 broadcasts),
            dtype and device.
        mask: broadcastable to generated's shape; bool, or floating point in [0, 1] (between: mixed linearly).
        sigma: noise level in [0, 1]: a number, or a floating-point tensor () or (batch,).

    Returns:
        A new tensor of generated's shape and dtype; computed in float32 at least. On a GPU without gradients
        one Triton kernel makes it, in one pass and without waiting for the device; else it is made of torch
        operators, which are differentiable.

    Raises:
        TypeError: dtypes or devices that differ, a mask that is neither bool nor floating point.
        ValueError: shapes that do not fit; a mask or sigma outside of [0, 1] (numbers and CPU tensors).
    """
    _check_latents(generated, source, noise)
    _check_mask(mask, generated)
    sigma = _check_sigma(sigma, generated)
    tensors = (generated, source, noise, mask, sigma)
    learns = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
    if learns or has_tangent(*tensors):
        return composed(generated, source, noise, mask, sigma)
    if not isinstance(sigma, Tensor):
        return _blend(generated, source, noise, mask, None, float(sigma))
    if (
        sigma.device.type == "cpu" != generated.device.type
        and sigma.numel() == 1
        and not torch.compiler.is_compiling()
    ):
        return _blend(
            generated, source, noise, mask, None, float(sigma)
        )  # a copy to the device would wait for it
    return _blend(generated, source, noise, mask, sigma.to(generated.device), 0.0)


def composed(generated: Tensor, source: Tensor, noise: Tensor, mask: Tensor, sigma: float | Tensor) -> Tensor:
    """The same from torch operators: any device and dtype, differentiable in everything."""
    wide = torch.promote_types(generated.dtype, torch.float32)
    if isinstance(sigma, Tensor):
        # (batch, 1, ..., 1); the ends are picked, not computed: noise may be anything where it does not count
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


def _run(
    generated: Tensor, source: Tensor, noise: Tensor, mask: Tensor, sigma: Tensor | None, number: float
) -> Tensor:
    level = number if sigma is None else sigma
    if triton_blend.usable(generated, source, noise, mask, level):
        return triton_blend.blend_latents(generated, source, noise, mask, level)
    # in the layout that the fake promises to a compiler
    result = composed(generated, source, noise, mask, level)
    out = torch.empty_like(generated)
    return result if result.stride() == out.stride() else out.copy_(result)


def _fake(generated: Tensor, *rest) -> Tensor:
    return torch.empty_like(generated)


_library = torch.library.Library("flashbrush", "FRAGMENT")
_library.define(
    "blend_latents(Tensor generated, Tensor source, Tensor noise, Tensor mask, Tensor? sigma, float number) -> Tensor"
)
_library.impl("blend_latents", _run, "CompositeExplicitAutograd")
torch.library.register_fake("flashbrush::blend_latents", _fake, lib=_library)
_blend = torch.ops.flashbrush.blend_latents.default


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

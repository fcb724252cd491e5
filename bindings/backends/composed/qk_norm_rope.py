"""qk_norm_rope and its gradient from torch's operators, on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.norm_rope import NormRope, sum_to


def forward(call: NormRope) -> Tensor:
    """Any device, differentiable in everything. Rounds after the norm too."""
    xs, weights, offsets, cos, sin, eps, half, permutation = call
    joined = []
    for x, weight, offset in zip(xs, weights, offsets, strict=True):
        if weight is not None:
            x = F.rms_norm(x, (x.shape[3],), weight.to(x.dtype), eps)
        joined.append(x if offset is None else x + offset.to(x.dtype))
    y = torch.cat(joined, 1)
    if cos is not None and sin is not None:
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        a, b = y.chunk(2, 3) if half else y.unflatten(3, (-1, 2)).unbind(4)
        rotated = torch.cat((-b, a), 3) if half else torch.stack((-b, a), 4).flatten(3)
        y = (y.to(wide) * cos.to(wide)[:, None] + rotated.to(wide) * sin.to(wide)[:, None]).to(y.dtype)
    if permutation is None:
        return y
    index = permutation.long()
    return y[:, index] if index.dim() == 1 else y.gather(1, index[:, :, None, None].expand_as(y))


def backward(
    dout: Tensor,
    call: NormRope,
    need_dweight: bool,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """dx, dweight and doffset, computed in float32; offsets: those whose gradient is wanted.

    With g = rotate^T(dout) * weight and r = 1 / sqrt(mean(x^2) + eps): dx = r * (g - x * r^2 * mean(g * x)).
    """
    xs, weights, offsets, cos, sin, eps, half, permutation = call
    wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
    dy = dout.to(wide)
    if permutation is not None:
        index = permutation.long()[..., None, None].expand(dy.shape)
        dy = torch.zeros_like(dy).scatter_add_(1, index, dy)
    if cos is not None and sin is not None:
        turned = dy * sin.to(wide)[:, None]
        a, b = turned.chunk(2, 3) if half else turned.unflatten(3, (-1, 2)).unbind(4)
        turned = torch.cat((b, -a), 3) if half else torch.stack((b, -a), 4).flatten(3)
        dy = dy * cos.to(wide)[:, None] + turned
    dxs, dweights, doffsets = [], [], []
    for x, weight, offset, d in zip(xs, weights, offsets, dy.split([x.shape[1] for x in xs], 1), strict=True):
        doffsets.append(None if offset is None else sum_to(offset, d))
        dweight = None
        if weight is not None:
            y = x.to(wide)
            r = (y.square().mean(3, keepdim=True) + eps).rsqrt()
            dweight = (d * y * r).sum((0, 1, 2)).to(weight.dtype) if need_dweight else None
            d = d * weight.to(wide)
            d = r * (d - y * r.square() * (d * y).mean(3, keepdim=True))
        dweights.append(dweight)
        dxs.append(torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(d))
    return dxs, dweights, doffsets

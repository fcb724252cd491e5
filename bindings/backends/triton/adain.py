"""adain in Triton: one read of x and style for the statistics, one read and one write to apply them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu.device import on_device
from ..gpu.eligibility import emulated, tensor_reasons

MOST_DIMS = 3  # of the space, joined; the kernels divide once for each that is left


def why_not(x: Tensor, style: Tensor, mask: Tensor | None, style_mask: Tensor | None) -> list[str]:
    if reasons := tensor_reasons(x):
        return reasons
    return [] if walkable(x, style, mask, style_mask) else ["strides that do not fold into few dimensions"]


def walkable(x: Tensor, style: Tensor, mask: Tensor | None, style_mask: Tensor | None) -> bool:
    """Whether the strides of both images, the masks and the result fold into few dimensions of space."""
    from ....kernels.adain import walk_space

    walks = (walk_space(x, torch.empty_like(x), mask), walk_space(style, style_mask))
    return all(len(walk.sizes) <= MOST_DIMS for walk in walks)


def adain(x: Tensor, style: Tensor, mask: Tensor | None, style_mask: Tensor | None, eps: float) -> Tensor:
    """As the public function, whose checked arguments these are."""
    from ....kernels.adain import adain_apply, adain_statistics

    out = torch.empty_like(x)
    if not out.numel():
        return out
    # a bool pointer is one of single bits in Triton
    masks = [None if m is None else m.view(torch.uint8) for m in (mask, style_mask)]
    with on_device(x):
        sums, style_sums = adain_statistics(x, masks[0]), adain_statistics(style, masks[1])
        adain_apply(out, x, masks[0], sums, style_sums, eps, emulated(x))
    return out

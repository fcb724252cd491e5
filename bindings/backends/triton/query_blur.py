"""query_blur in Triton: a pass along the width and one along the height, float32 between them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu.device import arch, on_device
from ..gpu.eligibility import emulated


def query_blur(
    q: Tensor, first: int, along_height: Tensor, along_width: Tensor, radii: tuple[int, int]
) -> Tensor:
    """q (batch, tokens, heads, dim) with the grid of tokens from `first` on blurred.

    along_height (height, height) and along_width (width, width) float32, zero farther than radii from their
    diagonals.
    """
    from ....kernels.query_blur import blur_side

    height, width = len(along_height), len(along_width)
    last = first + height * width
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[:, :first], out[:, last:] = q[:, :first], q[:, last:]
    # (batch, height, width, heads, dim)
    image, blurred = (t[:, first:last].unflatten(1, (height, width)) for t in (q, out))
    if image.numel():
        between = torch.empty(image.shape, dtype=torch.float32, device=q.device)
        # three products of tensor cores are a float32 one to its last bits; other machines have their own
        precision = "tf32x3" if arch(q.device) >= 80 else "ieee"
        with on_device(q):
            blur_side(between, image, along_width, radii[1], precision, False)
            turned = blurred.transpose(1, 2), between.transpose(1, 2)
            blur_side(*turned, along_height, radii[0], precision, emulated(q))
    return out

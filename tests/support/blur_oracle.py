"""The oracle of query_blur(): a padded image and a convolution of two dimensions, in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_taps(side: int, sigma: float) -> Tensor:
    """(taps,) float64 that add up to 1: ceil(6 sigma) made odd, at most the side's largest odd number."""
    count = math.ceil(6 * sigma)
    count += count % 2 == 0
    if count > side:
        count = side if side % 2 else side - 1
    steps = [math.exp(-((i - count // 2) ** 2) / (2 * sigma**2)) for i in range(count)]
    values = torch.tensor(steps, dtype=torch.float64)
    return values / values.sum()


def blur_by_convolution(q: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    """q (batch, height * width, heads, dim) -> the same shape, float64."""
    (height, width), (batch, _, heads, dim) = grid, q.shape
    down, along = (gaussian_taps(side, sigma).to(q.device) for side in grid)
    image = q.double().permute(0, 2, 3, 1).reshape(batch * heads * dim, 1, height, width)
    # the padding of one dimension at a time: torch refuses to reflect a side of one, even by nothing
    for taps, pad in ((along, (len(along) // 2,) * 2 + (0, 0)), (down, (0, 0) + (len(down) // 2,) * 2)):
        image = F.pad(image, pad, mode="reflect") if len(taps) > 1 else image
    image = F.conv2d(image, torch.outer(down, along)[None, None])
    return image.reshape(batch, heads, dim, height * width).permute(0, 3, 1, 2)

"""query_blur from torch's operators, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def query_blur(
    q: Tensor, first: int, along_height: Tensor, along_width: Tensor, radii: tuple[int, int]
) -> Tensor:
    """Two products, in the matrices' dtype.

    Args:
        q: (batch, tokens, heads, dim).
        first: the first token of the grid.
        along_height: (height, height).
        along_width: (width, width).
        radii: how far from their diagonals the matrices reach; not used here.
    """
    batch, _, heads, dim = q.shape
    height, width = len(along_height), len(along_width)
    last = first + height * width
    image = q[:, first:last].to(along_width.dtype).reshape(batch, height, width * heads * dim)
    image = along_height.expand(batch, -1, -1) @ image
    image = along_width.expand(batch * height, -1, -1) @ image.reshape(batch * height, width, heads * dim)
    image = image.reshape(batch, height * width, heads, dim).to(q.dtype)
    return image if last - first == q.shape[1] else torch.cat((q[:, :first], image, q[:, last:]), 1)

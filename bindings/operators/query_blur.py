"""The registered query_blur: a blur along each side of the token grid, as a product with a small matrix."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..backends.planner import resolve
from .library import register


def taps(side: int, sigma: float) -> int:
    """The number of taps: odd, and at most `side`, as a reflection needs a reach below the side."""
    wanted = math.ceil(min(6 * sigma, side + 2.0))
    return min(wanted + 1 - wanted % 2, side - 1 + side % 2)


def blur_matrix(side: int, sigma: float) -> Tensor:
    """(side, side) float64: row i holds the taps around place i, reflected at the borders."""
    reach = taps(side, sigma) // 2
    steps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (steps.double() / sigma).square())
    places = (torch.arange(side)[:, None] + steps).abs()
    places = torch.where(places < side, places, 2 * (side - 1) - places)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(side, -1))


@functools.lru_cache(maxsize=64)
def _matrix(side: int, sigma: float, transposed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cached by content: only the first use copies to the device, for which a GPU would have to wait."""
    matrix = blur_matrix(side, sigma)
    return (matrix.T if transposed else matrix).to(dtype).contiguous().to(device)


def _run(
    q: Tensor, height: int, width: int, sigma: float, first: int, transposed: bool, *, backend: str = "auto"
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    along_height, along_width = (_matrix(side, sigma, transposed, wide, q.device) for side in (height, width))
    radii = taps(height, sigma) // 2, taps(width, sigma) // 2
    return resolve("query_blur", backend, q.device, q)(q, first, along_height, along_width, radii)


def _fake(q: Tensor, *_, **__) -> Tensor:
    return q.new_empty(q.shape)


query_blur = register(
    "query_blur(Tensor q, SymInt height, SymInt width, float sigma, SymInt first, bool transposed, "
    '*, str backend="auto") -> Tensor',
    _run,
    _fake,
)

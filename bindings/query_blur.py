"""query_blur(): a Gaussian blur of the queries over the grid of image tokens, which flattens the attention's
energy.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .backends.triton import query_blur as triton_query_blur
from .core.autograd import refuse_tangents

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def query_blur(q: Tensor, grid: tuple[int, int], sigma: float, *, tokens: slice | None = None) -> Tensor:
    """Queries blurred over their places in the image: smoothed energy guidance's perturbation (arXiv
    2408.00760, 4.2).

    The blur is a Gaussian of k taps along each side of the grid, normalised, with the grid reflected at its
    borders
    (the border itself once): k = ceil(6 sigma) + 1 - ceil(6 sigma) % 2, at most the largest odd number that
        the side
    holds (the published code allows one more where the side is even). Differentiable in q.

    Args:
        q: (batch, tokens, heads, dim), of any strides; float32, bfloat16, float16 or float64.
        grid: (height, width) in tokens, which lie row by row.
        sigma: of the Gaussian, in tokens, >= 0. inf: the mean over the grid in every place.
        tokens: the slice of the tokens which are the image, height * width of them; all others pass
            unchanged. None: all of them are.

    Returns:
        (batch, tokens, heads, dim) in q's dtype, from float32 arithmetic (float64 for float64), rounded once.
        sigma 0:
        q itself, not a copy. sigma inf over all tokens: one row, expanded (its stride over the tokens is 0),
            so that a
        caller may attend with [:, :1] alone and expand the result. A NaN or Inf may spread over its whole
        image, in its own head and column.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_q(q)
    height, width = _check_grid(grid)
    sigma = _check_sigma(sigma)
    first = _check_tokens(tokens, q.shape[1], height, width)
    if sigma == 0:
        return q
    if sigma == math.inf:
        return _mean(q, first, first + height * width)
    refuse_tangents(q)
    if torch.is_grad_enabled() and q.requires_grad:
        return _QueryBlur.apply(q, height, width, sigma, first, False)
    return _blur(q, height, width, sigma, first, False)


def taps(side: int, sigma: float) -> int:
    """Odd, and at most `side`: a reflection needs a tap's reach to be less than the side."""
    wanted = math.ceil(min(6 * sigma, side + 2.0))
    return min(wanted + 1 - wanted % 2, side - 1 + side % 2)


def blur_matrix(side: int, sigma: float) -> Tensor:
    """(side, side) float64: row i holds the taps around place i, those beyond a border on the places they
    reflect to.
    """
    reach = taps(side, sigma) // 2
    steps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (steps.double() / sigma).square())
    places = (torch.arange(side)[:, None] + steps).abs()
    places = torch.where(places < side, places, 2 * (side - 1) - places)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(side, -1))


def composed(q: Tensor, first: int, along_height: Tensor, along_width: Tensor) -> Tensor:
    """The same from torch operators, in the matrices' dtype: any device."""
    batch, _, heads, dim = q.shape
    height, width = len(along_height), len(along_width)
    last = first + height * width
    image = q[:, first:last].to(along_width.dtype).reshape(batch, height, width * heads * dim)
    image = along_height.expand(batch, -1, -1) @ image
    image = along_width.expand(batch * height, -1, -1) @ image.reshape(batch * height, width, heads * dim)
    image = image.reshape(batch, height * width, heads, dim).to(q.dtype)
    return image if last - first == q.shape[1] else torch.cat((q[:, :first], image, q[:, last:]), 1)


def _mean(q: Tensor, first: int, last: int) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    row = q[:, first:last].mean(1, keepdim=True, dtype=wide).to(q.dtype)
    row = row.expand(-1, last - first, -1, -1)
    return row if last - first == q.shape[1] else torch.cat((q[:, :first], row, q[:, last:]), 1)


class _QueryBlur(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, height, width, sigma, first, transposed):  # type: ignore[override]
        ctx.rest = height, width, sigma, first
        ctx.transposed = transposed
        return _blur(q, height, width, sigma, first, transposed)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[override]
        return _QueryBlur.apply(dout, *ctx.rest, not ctx.transposed), None, None, None, None, None


@functools.lru_cache(maxsize=64)
def _matrix(side: int, sigma: float, transposed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept by content: only its first use copies to the device."""
    matrix = blur_matrix(side, sigma)
    return (matrix.T if transposed else matrix).to(dtype).contiguous().to(device)


def _run(q: Tensor, height: int, width: int, sigma: float, first: int, transposed: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    along_height, along_width = (_matrix(side, sigma, transposed, wide, q.device) for side in (height, width))
    if triton_query_blur.usable(q):
        radii = taps(height, sigma) // 2, taps(width, sigma) // 2
        return triton_query_blur.query_blur(q, first, along_height, along_width, radii)
    return composed(q, first, along_height, along_width)


def _fake(q: Tensor, *rest) -> Tensor:
    return q.new_empty(q.shape)


_library = torch.library.Library("flashbrush", "FRAGMENT")
_library.define(
    "query_blur(Tensor q, SymInt height, SymInt width, float sigma, SymInt first, bool transposed) -> Tensor"
)
_library.impl("query_blur", _run, "CompositeExplicitAutograd")
torch.library.register_fake("flashbrush::query_blur", _fake, lib=_library)
_blur = torch.ops.flashbrush.query_blur.default


def _check_q(q: Tensor) -> None:
    if not isinstance(q, Tensor) or q.dtype not in DTYPES:
        got = q.dtype if isinstance(q, Tensor) else type(q).__name__
        raise TypeError(f"q: expected a float32, bfloat16, float16 or float64 tensor, got {got}")
    if q.dim() != 4:
        raise ValueError(f"q: expected shape (batch, tokens, heads, dim), got {tuple(q.shape)}")


def _check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    whole = isinstance(grid, (tuple, list)) and all(_is_int(side) for side in grid)
    if not whole or len(grid) != 2:
        raise TypeError(f"grid: expected two ints (height, width), got {grid!r}")
    if min(grid) < 1:
        raise ValueError(f"grid: expected sides of at least 1, got {tuple(grid)}")
    return grid[0], grid[1]


def _check_sigma(sigma: float) -> float:
    if not isinstance(sigma, (int, float)) or isinstance(sigma, bool):
        raise TypeError(f"sigma: expected a number, got {type(sigma).__name__}")
    if not sigma >= 0:  # NaN too
        raise ValueError(f"sigma: expected a number >= 0 or inf, got {sigma}")
    return float(sigma)


def _check_tokens(tokens: slice | None, total: int, height: int, width: int) -> int:
    """The first token of the image."""
    if tokens is not None and not isinstance(tokens, slice):
        raise TypeError(f"tokens: expected a slice or None, got {type(tokens).__name__}")
    bounds = (None, None) if tokens is None else (tokens.start, tokens.stop)
    if tokens is not None and (
        tokens.step not in (None, 1) or any(bound is not None and not _is_int(bound) for bound in bounds)
    ):
        raise ValueError(f"tokens: expected a slice of ints without a step, got {tokens}")
    first, last = (
        default if bound is None else max(bound + total, 0) if bound < 0 else min(bound, total)
        for bound, default in zip(bounds, (0, total), strict=True)
    )
    if last - first != height * width:
        name = "grid" if tokens is None else "tokens"
        expected = f"{height} * {width} = {height * width} tokens"
        raise ValueError(f"{name}: expected {expected}, got {max(last - first, 0)} of {total}")
    return first


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)

"""query_blur(): a Gaussian blur of the queries over the grid of image tokens (smoothed energy guidance)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends.planner import check_name
from .core.autograd import refuse_tangents
from .operators.query_blur import query_blur as operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def query_blur(
    q: Tensor,
    grid: tuple[int, int],
    sigma: float,
    *,
    tokens: slice | None = None,
    backend: str = "auto",
) -> Tensor:
    """Queries blurred over their places in the image: the perturbation of SEG (arXiv 2408.00760, section
    4.2).

    The blur is a normalised Gaussian of n taps along each side of the grid, which is reflected at its borders
    without repeating the border itself. n = ceil(6 sigma) + 1 - ceil(6 sigma) % 2, at most the largest odd
    number that the side holds (the published code allows one more where the side is even). Differentiable in
    q.

    Args:
        q: (batch, tokens, heads, dim), any strides; float32, bfloat16, float16 or float64.
        grid: (height, width) in tokens, which lie row by row.
        sigma: of the Gaussian, in tokens, >= 0. 0: no blur. inf: every query becomes the mean over the grid.
        tokens: the slice of the tokens that are the image, height * width of them; the others pass unchanged.
            None: all tokens.
        backend: "auto", or a name of backends(). A named one raises with its reasons rather than fall back.

    Returns:
        (batch, tokens, heads, dim) in q's dtype, computed in float32 (float64 for float64) and rounded once.
        For sigma 0: q itself, not a copy. For sigma inf over all tokens: one row, expanded (token stride 0),
        so that a caller may attend with [:, :1] alone. A NaN or Inf may spread over its whole image, within
        its head and channel.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch, flashbrush as fb
        >>> fb.query_blur(torch.randn(1, 12, 2, 8), (3, 4), sigma=1.0).shape
        torch.Size([1, 12, 2, 8])
    """
    _check_q(q)
    height, width = _check_grid(grid)
    sigma = _check_sigma(sigma)
    first = _check_tokens(tokens, q.shape[1], height, width)
    check_name(backend)
    if sigma == 0:
        return q
    if sigma == math.inf:
        return _mean(q, first, first + height * width)
    refuse_tangents(q)
    if torch.is_grad_enabled() and q.requires_grad:
        return _QueryBlur.apply(q, height, width, sigma, first, False, backend)
    return operator(q, height, width, sigma, first, False, backend=backend)


def _mean(q: Tensor, first: int, last: int) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    row = q[:, first:last].mean(1, keepdim=True, dtype=wide).to(q.dtype)
    row = row.expand(-1, last - first, -1, -1)
    return row if last - first == q.shape[1] else torch.cat((q[:, :first], row, q[:, last:]), 1)


class _QueryBlur(torch.autograd.Function):
    """The gradient of a blur is the blur with transposed matrices."""

    @staticmethod
    def forward(ctx, q, height, width, sigma, first, transposed, backend):  # type: ignore[override]
        ctx.grid, ctx.transposed, ctx.backend = (height, width, sigma, first), transposed, backend
        return operator(q, height, width, sigma, first, transposed, backend=backend)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[override]
        return _QueryBlur.apply(dout, *ctx.grid, not ctx.transposed, ctx.backend), *(None,) * 6


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

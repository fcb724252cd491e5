"""Bounds for float32 from a count of its roundings, which no library's order of summation changes.

A float32 result is rounded by at most u = 2^-24 of itself, and by c * u in root mean square, c = 0.42: the
error is even over half a unit in the last place, and mantissas are even in their logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = 0.42 * 2.0**-24  # c * u


def positive_sum(*lengths: int) -> float:
    """Variance of the relative error of a sum of positive terms of one size, in units of ROUNDING^2.

    The k-th partial sum of n is k / n of the result and is rounded once; errors are independent.

    Args:
        lengths: terms added one by one at each level, the innermost first. positive_sum(128, 8) adds 8 sums
            of 128 terms each.
    """
    variance, sums = 0.0, 1
    for n in reversed(lengths):
        variance += sum((k / n) ** 2 for k in range(2, n + 1)) / sums
        sums *= n
    return variance


def cpu_attention(keys: int) -> float:
    """Variance of the relative error of the C++ backend's output over this many keys with positive values.

    In units of ROUNDING^2. Its sums (csrc/cpu/kernels.h) are over the 128 keys of a tile, over 4 to 8 tiles
    and over those; a row's sum of probabilities has 4 lanes or more. Then come 1 / sum and the product with
    it.
    """
    tiles = math.ceil(keys / 128)
    output = max(positive_sum(128, n, math.ceil(tiles / n)) for n in (4, 8))
    row_sum = max(positive_sum(32, n, math.ceil(tiles / n), 4) for n in (4, 8))
    return output + row_sum + 2


# Operators that return what they were given, or constants.
_EXACT = {
    "_to_copy", "_unsafe_view", "abs", "arange", "cat", "clone", "constant_pad_nd", "copy_", "empty",
    "empty_like", "fill_", "full", "gather", "index", "index_select", "lift_fresh", "maximum",
    "minimum", "neg", "new_empty", "new_zeros", "ones", "ones_like", "scalar_tensor", "stack",
    "upsample_nearest2d", "where", "zeros", "zeros_like",
}  # fmt: skip
_PRODUCTS = {"mm": 0, "bmm": 0, "convolution": 0, "addmm": 1, "baddbmm": 1}  # name: place of the first factor
_NORMS = ("native_group_norm", "native_layer_norm")


class Float32Rounding(TorchDispatchMode):
    """Adds to every float64 result an error as float32 would make it, drawn at random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, size: Tensor) -> Tensor:
        """Errors of results that are rounded as if they were of this size."""
        return ROUNDING * size * torch.randn(size.shape, generator=self.generator, dtype=torch.float64)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _NORMS:  # x - mean rounds x and the mean
            args = (args[0] + self.draw(math.sqrt(2) * args[0].abs()), *args[1:])
        result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, tuple) else result
        if not isinstance(out, Tensor) or out.dtype != torch.float64 or func.is_view or name in _EXACT:
            return result
        if name in _PRODUCTS:
            size = _product_size(func, name, args, out)
        elif name == "_softmax":  # log(p) is rounded, then exp and the division are
            size = out * (2 + out.clamp(min=1e-300).log().square()).sqrt()
        else:
            size = out.abs()
        out.add_(self.draw(size))
        return result


def _product_size(func, name: str, args: tuple, out: Tensor) -> Tensor:
    """Root of the sum of squares of a matrix product's partial sums, n products being added one by one.

    The k-th is a random walk that ends at the result: k * mean(product^2) + (k / n * out)^2.
    """
    first = _PRODUCTS[name]
    a, b = args[first], args[first + 1]
    n = b[0].numel() if name == "convolution" else a.shape[-1]
    squared = list(args)
    squared[first], squared[first + 1] = a.square(), b.square()
    if name == "convolution":
        squared[2] = None  # the bias
    elif first:
        squared[0] = torch.zeros_like(args[0])
    return (n / 2 * func(*squared) + n / 3 * out.square()).sqrt()


def exact_and_error(run: Callable[[], Sequence[Tensor]], draws: int = 2) -> tuple[list[Tensor], list[float]]:
    """A float64 run, and how far a float32 run may be from it by the model above.

    Args:
        run: computes in float64 without gradients, the same at every call.
        draws: how often errors are drawn; the largest counts.

    Returns:
        The exact results, and of each max abs(rounded - exact) / max abs(exact).
    """
    with sdpa_kernel(SDPBackend.MATH):  # its steps are operators that the mode sees
        exact = list(run())
        errors = [0.0] * len(exact)
        for seed in range(draws):
            with Float32Rounding(seed):
                rounded = run()
            for i, (a, b) in enumerate(zip(rounded, exact, strict=True)):
                errors[i] = max(errors[i], float((a - b).abs().max() / b.abs().max()))
    return exact, errors

"""Several tensors of one shape, walked together: the fewest dimensions that hold them all, and offsets into
each.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl

Strides = tuple[int, ...]


class Walk(NamedTuple):
    """Sizes, outermost first, and every tensor's strides in them; None: that dimension does not move the
    tensor.
    """

    sizes: tuple[int, ...]
    strides: tuple[tuple[int | None, ...], ...]
    wide: bool  # some offset does not fit 32 bits


@functools.lru_cache(maxsize=1024)
def collapse(shape: tuple[int, ...], *tensors: Strides) -> Walk:
    """The elements of tensors of one shape (broadcast ones expanded, with strides of 0), in the first one's
    order.

    Dimensions of one element are left out, and neighbours that every tensor steps through evenly are joined.
    """
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -tensors[0][d])
    sizes: list[int] = []
    steps: list[list[int]] = []  # of each dimension, one for each tensor
    for d in order:
        step = [strides[d] for strides in tensors]
        if sizes and all(outer == inner * shape[d] for outer, inner in zip(steps[-1], step, strict=True)):
            sizes[-1] *= shape[d]
            steps[-1] = step
        else:
            sizes.append(shape[d])
            steps.append(step)
    if not sizes:
        sizes, steps = [1], [[0] * len(tensors)]
    columns = list(zip(*steps, strict=True))
    reach = (sum((size - 1) * step for size, step in zip(sizes, column, strict=True)) for column in columns)
    # a block begins before the last element and may end beyond it
    wide = max(math.prod(sizes), *reach) >= 2**31 - 2**16
    return Walk(tuple(sizes), tuple(tuple(step or None for step in column) for column in columns), wide)


@triton.jit
def offsets(o, sizes, strides, DIMS: tl.constexpr):
    """Where the elements o, counted in a walk's order, lie in one of its tensors"""
    o_x = o * 0
    for i in tl.static_range(DIMS - 1):
        if strides[DIMS - 1 - i] is not None:
            o_x += (o % sizes[DIMS - 1 - i]) * strides[DIMS - 1 - i]
        o = o // sizes[DIMS - 1 - i]
    if strides[0] is not None:
        o_x += o * strides[0]
    return o_x

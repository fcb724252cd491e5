"""Small tensors and counts that a launch derives from segment lengths."""

from __future__ import annotations

import functools
from itertools import accumulate

import torch
from torch import Tensor


@functools.lru_cache(maxsize=4096)
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of these values, cached: only the first use copies them to the device."""
    return torch.tensor(values, dtype=dtype, device=device)


def starts(lengths: tuple[int, ...], items: Tensor | None, device: torch.device) -> Tensor:
    """First token of each segment, then the end: (1|B, segments + 1) int32.

    Args:
        lengths: tokens of each segment, where all batch items agree.
        items: (B, segments) int32 lengths of each item, in place of `lengths` if given.
        device: where the result lies.
    """
    if items is None:
        return _starts(lengths, device)
    return torch.nn.functional.pad(items.cumsum(1, dtype=torch.int32), (1, 0))


@functools.lru_cache(maxsize=4096)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return constant(tuple(accumulate(lengths, initial=0)), torch.int32, device)[None]


def blocks(lengths: tuple[int, ...], items: Tensor | None, size: int) -> int:
    """Blocks of `size` tokens in one batch item: every segment begins a new one.

    Args:
        lengths: tokens of each segment, where all batch items agree.
        items: (B, segments) int32 lengths of each item; the result is then an upper bound of all items.
        size: tokens of a block.
    """
    if items is None:
        return sum(-(-length // size) for length in lengths)
    total = sum(lengths)
    return total // size + min(len(lengths), total)

"""Tile sizes and launch options of the attention kernels, as pure functions."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    block_m: int
    block_n: int
    warps: int
    stages: int


def split_dim(dim: int) -> tuple[int, int]:
    """A head dim as one or two power-of-two tiles of at least 16 columns; (D1, 0) where a second saves nothing.

    40 = 32 + 8, 80 = 64 + 16, 96 = 64 + 32 and 160 = 128 + 32 would waste 24 to 96 columns of every product as one.
    """
    whole = max(16, 1 << (dim - 1).bit_length())
    first = max(16, whole // 2)
    second = max(16, 1 << (dim - first - 1).bit_length()) if dim > first else 0
    return (whole, 0) if whole == dim or first + second >= whole else (first, second)


def forward_tile(arch: int, dim: int, itemsize: int, grouped: bool = False, mass: int = 0) -> Tile:
    """Tile of the forward kernel. arch: compute capability * 10; itemsize: bytes of an element."""
    return Tile(128, 64, 8, 2)

"""Tile sizes and launch options of the attention kernels, as pure functions."""

from __future__ import annotations

from typing import NamedTuple


class TileConfig(NamedTuple):
    """Tile sizes and launch options of a kernel."""

    block_m: int  # rows
    block_n: int  # keys
    warps: int
    stages: int  # of the software pipeline
    descriptors: bool = False  # read full tiles of keys and values through tensor descriptors (TMA)

    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def split_dim(dim: int, itemsize: int) -> tuple[int, ...]:
    """A head dim as tiles of power-of-two widths, the last one padded.

    40 = 32 + 8, 80 = 64 + 16, 96 = 64 + 32, 160 = 128 + 32: as one power of two they would pad 24 to 96
    columns of every product. float32 is cut into tiles of 32: an IEEE product keeps its whole operands in
    registers.
    """
    widest = 32 if itemsize == 4 else 256
    parts = []
    while dim > 0:
        whole = max(16, 1 << (dim - 1).bit_length())
        width = whole if whole - dim < whole // 4 or whole == 16 else whole // 2
        parts.append(min(width, widest))
        dim -= parts[-1]
    return tuple(parts)


def forward_tile(
    arch: int, dim: int, itemsize: int, grouped: bool = False, mass: int = 0, mixed: bool = False
) -> TileConfig:
    """Tile of the forward kernel: the largest that spills no register in any feature, compiled for sm_80 and
    sm_90.

    Args:
        arch: compute capability * 10; 0 where there is none (the interpreter, other vendors).
        dim: head dim. itemsize: bytes of an element.
        grouped: several softmax groups, whose accumulators a block of rows holds beside the sum over groups.
        mass: columns of the mass. Its row sums are 1 of dim registers a row: no reason for another tile.
        mixed: ranges of short segments, whose bias and weight of each key live beside the tile.
    """
    if itemsize == 4:
        # An IEEE product goes through FMA, with whole operands in registers: beyond D 64, 32 rows spill in
        # contrast with clip.
        return TileConfig(64, 32, 8, 2) if dim <= 64 else TileConfig(16, 32, 4, 2)
    hopper = arch >= 90
    if mixed and dim <= 128 and (not hopper or dim > 64):
        return TileConfig(128, 32, 8, 3) if hopper else TileConfig(128 if dim <= 64 else 64, 32, 8, 2)
    if dim <= 64:
        # 128 x 128 fits without groups only; a third stage pays for itself where copies are asynchronous to
        # wgmma.
        return TileConfig(128, 64, 8, 3 if hopper else 2)
    if dim > 128:
        # Two accumulators of 64 x 256 leave no room for wider tiles.
        return TileConfig(64, 16, 8, 2)
    if arch >= 100 and grouped:
        # tcgen05's accumulators pass through registers: two of 128 rows are too many.
        return TileConfig(64, 64, 8, 2)
    if hopper:
        # 128 KiB of K and V in flight of the 227 KiB; a second accumulator takes the registers of half the
        # tile.
        return TileConfig(128, 32 if grouped else 64, 8, 3)
    # Four warps with 64 rows keep each warp's share of Q in registers; eight leave room for the second
    # accumulator.
    return TileConfig(64, 32, 8, 2) if grouped else TileConfig(64, 32, 4, 3)


def backward_tiles(
    arch: int, dim: int, itemsize: int, grouped: bool = False
) -> tuple[TileConfig, TileConfig]:
    """Tiles of the two gradient kernels: the one that owns rows, and the one that owns keys.

    Two operands and one or two accumulators stay in registers, and two tiles stream past. Chosen by compiling
    for sm_80, sm_90, sm_100 and gfx942 with Triton 3.9, where nothing spills up to D 160; not timed.
    Arguments as in forward_tile.
    """
    if itemsize == 4:
        # Whole operands of an IEEE product in registers, as in the forward kernel.
        return (TileConfig(32, 32, 4, 2) if dim <= 64 else TileConfig(16, 32, 4, 1)), TileConfig(16, 32, 4, 2)
    if arch == 0:
        if dim <= 64:
            return (
                (TileConfig(64, 32, 4, 1), TileConfig(32, 64, 4, 1))
                if grouped
                else (TileConfig(128, 32, 8, 1), TileConfig(32, 128, 8, 1))
            )
        return (
            (TileConfig(64, 16, 4, 1), TileConfig(16, 64, 4, 1))
            if dim <= 128
            else (TileConfig(64, 16, 8, 1), TileConfig(16, 64, 8, 1))
        )
    if arch >= 100 and 64 < dim <= 128:
        # tcgen05's accumulators pass through registers: those of 128 keys are too many.
        return TileConfig(128, 32, 8, 2), TileConfig(32, 64, 8, 2)
    if dim <= (128 if arch >= 90 else 80):
        return TileConfig(128, 32, 8, 2), TileConfig(32, 128, 8, 2)
    if arch >= 90:
        # wgmma multiplies 64 keys or more; beyond D 160 two accumulators of as many rows spill, and mma.sync
        # takes 32.
        return (
            (TileConfig(128, 32, 8, 2), TileConfig(16, 128, 8, 2))
            if dim <= 160
            else (TileConfig(64, 16, 8, 2), TileConfig(16, 32, 4, 1))
        )
    if dim <= 128:
        # Several groups sweep twice, whose loops together want more registers than four warps have.
        return TileConfig(128, 32, 8, 1) if grouped else TileConfig(64, 32, 4, 2), TileConfig(32, 64, 8, 2)
    return TileConfig(64, 16, 8, 2), TileConfig(16, 64, 8, 2)


def column_tile(arch: int, dim: int, itemsize: int) -> TileConfig:
    """Tile of the column mass: a block of keys stays in registers, rows stream past it."""
    if itemsize == 4:
        return TileConfig(32, 32, 4, 2)
    return TileConfig(64, 128, 8, 2)

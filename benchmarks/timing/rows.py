"""A row of the results, and the parts that every section's rows have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..cases.shapes import Shape
from .rounds import Samples, Spread, spread

Row = dict[str, object]


@dataclass(frozen=True)
class Settings:
    """What `flashbrush bench` was asked for.

    Attributes:
        repeats: rounds, each of every contestant once.
        threads: of torch, and of our kernels.
        seed: of inputs and of the order within rounds.
        with_memory: whether peak memory is measured, in a child process per contestant.
        with_flex: whether FlexAttention takes part.
        gemm_sides: sides of the square matrix products that are timed beside the forward pass.
    """

    repeats: int = 7
    threads: int = 1
    seed: int = 0
    with_memory: bool = True
    with_flex: bool = False
    gemm_sides: tuple[int, ...] = (2048, 4096)


def describe_shape(shape: Shape) -> Row:
    return {
        "name": shape.name,
        "size": shape.size,
        "batch": shape.batch,
        "heads": shape.heads,
        "rows": shape.n_rows,
        "keys": shape.n_keys,
        "dim": shape.dim,
        "row_segments": len(shape.rows),
        "key_segments": len(shape.keys),
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds_cells(samples: Samples) -> dict[str, Row]:
    """Spread and all samples of each contestant."""
    return {name: {**spread(s).as_dict(), "samples": s} for name, s in samples.items()}


def ratio_cells(ratios: Mapping[str, Spread]) -> dict[str, Row]:
    """Spread of each ratio, to four digits."""
    return {name: {k: round(v, 4) for k, v in s.as_dict().items()} for name, s in ratios.items()}


def untimed(row: Row, name: str, reasons: Sequence[str]) -> Row:
    """The row of a section that cannot run here: no times, and the reasons under `missing`."""
    return {**row, "seconds": {}, "ratios": {}, "missing": {name: "; ".join(reasons)}}

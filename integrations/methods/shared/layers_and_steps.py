"""Which layers and which steps a method controls."""

from __future__ import annotations

from collections.abc import Sequence

from ...diffusers.protocol.layer import Layer
from .knobs import PLACES


def is_self_attention(layer: Layer, places: Sequence[str] = PLACES) -> bool:
    """Whether the layer is a UNet's self-attention in one of `places`.

    Raises:
        ValueError: the model is no UNet of transformer blocks.
    """
    if layer.kind not in ("self", "cross") or layer.place is None:
        raise ValueError(
            f"method: expected the self-attention of a UNet; layer {layer.index} is {layer.kind!r}"
        )
    return layer.kind == "self" and layer.place in places


def block_index(layer: Layer) -> int:
    """The transformer block's index in a UNet's forward pass; each has a self- and a cross-attention.

    It is also the index among the self-attention layers: 0 to 15 in SD 1.5 and SD 2, 0 to 69 in SDXL.
    """
    return layer.index // 2


def known_grid(layer: Layer) -> tuple[int, int]:
    """(rows, columns) of the layer's image tokens.

    Raises:
        ValueError: it is not known, as of FLUX without ``handle.grid``.
    """
    if layer.grid is None:
        raise ValueError("grid: the grid of image tokens is not known; set handle.grid = (rows, columns)")
    return layer.grid


def has_resolution(layer: Layer, resolution: int | tuple[int, int]) -> bool:
    """Whether the layer has resolution^2 image tokens, or a grid of (rows, columns)."""
    return layer.grid == resolution if isinstance(resolution, tuple) else layer.image_len == resolution**2


def within(window: tuple[int, int | None], index: int) -> bool:
    """Whether the index is in the window (first, one after the last or None)."""
    first, end = window
    return first <= index and (end is None or index < end)


def scaled(window: tuple[int, int | None], share: float) -> tuple[int, int | None]:
    """The window of a run of `share` times as many steps."""
    first, end = window
    return round(share * first), None if end is None else round(share * end)

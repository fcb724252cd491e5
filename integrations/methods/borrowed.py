"""Self-attention in which items of a batch read other items: what the training-free in-context methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ...bindings import Contrast, Control, Segments
from ..diffusers.plan import Layer, Part, Plan

Clip = tuple[float, float] | None
Resolution = int | tuple[int, int]


class Reader(NamedTuple):
    """The batch item whose output is softmax(Q K^T) V, and the items that its Q, its K and its V are of."""

    item: int
    query: int
    keys: tuple[int, ...]  # several: joined in one softmax
    values: tuple[int, ...]  # one for each of `keys`


def read(layer: Layer, readers: Sequence[Reader], temperature: float, beta: float, clip: Clip) -> Plan:
    """The plan in which the readers, which have equally many keys, read others, and all other items themselves.

    With N tokens an item, n items of keys and d the head dim: P = softmax(QK^T / (temperature sqrt(d))) over all n N
    keys, of mean mu = 1/(n N) in every row, becomes clip(mu + beta (P - mu)), which weighs the values.
    """
    return _read(layer.image_len, layer.head_dim, tuple(readers), temperature, beta, clip)


@lru_cache(maxsize=256)
def _read(tokens: int, dim: int, readers: tuple[Reader, ...], temperature: float, beta: float, clip: Clip) -> Plan:
    keys = torch.tensor([reader.keys for reader in readers]).unbind(1)
    values = torch.tensor([reader.values for reader in readers]).unbind(1)
    # Probabilities lie within (0, 1): then beta = 1 changes nothing, and a sweep over the keys is saved.
    contrast = None if beta == 1 and clip in (None, (0, 1)) else Contrast(beta, clip)
    segments = Segments({f"item_{n}": tokens for n in range(1, len(keys) + 1)})
    part = Part(
        [reader.item for reader in readers],
        {"q": torch.tensor([reader.query for reader in readers]), "k": keys, "v": values},
        Control(Segments(tokens=tokens), segments, contrast=contrast),
        1 / (temperature * math.sqrt(dim)),
    )
    return Plan(parts=[part])


def is_self(layer: Layer, places: Sequence[str]) -> bool:
    """Whether it is a UNet's self-attention in one of `places`; ValueError where the model is of another make."""
    if layer.kind not in ("self", "cross") or layer.place is None:
        raise ValueError(f"method: it is made for the self-attention of a UNet; layer {layer.index} is {layer.kind!r}")
    return layer.kind == "self" and layer.place in places


def has_resolution(layer: Layer, resolution: Resolution) -> bool:
    """Whether the layer's tokens are a grid of resolution^2, or of (rows, columns)."""
    return layer.grid == resolution if isinstance(resolution, tuple) else layer.image_len == resolution**2


def checked(name: str, value: Any, roles: type) -> Any:
    """A knob's value in its canonical form; ValueError where it is a wrong one.

    Args:
        name: of the knob; what is not known here passes.
        roles: the class of what `items` holds.
    """
    canonical = value
    if name == "temperature" and not _is_positive(value):
        raise ValueError(f"temperature: expected a finite number > 0, got {value!r}")
    if name == "contrast":
        Contrast(value, None)
    if name == "clip" and value is not None:
        Contrast(1.0, value)
        canonical = tuple(value)
    if name == "places":
        canonical = (value,) if isinstance(value, str) else tuple(value)
        if not canonical or set(canonical) - {"down", "mid", "up"}:
            raise ValueError(f"places: expected some of down, mid, up, got {value!r}")
    if name == "items" and value is not None:
        canonical = (value,) if isinstance(value, roles) else tuple(value)
        if not canonical or not all(isinstance(item, roles) for item in canonical):
            raise ValueError(f"items: expected one or several {roles.__name__}, got {value!r}")
    return canonical


def check_window(name: str, window: Any) -> tuple[int, int | None]:
    """(first step, the one after the last, or None); ValueError for other values."""
    first, last = window if isinstance(window, (tuple, list)) and len(window) == 2 else (-1, None)
    if not isinstance(first, int) or first < 0 or not (last is None or (isinstance(last, int) and last >= first)):
        raise ValueError(f"{name}: expected (first step, the one after the last or None), got {window!r}")
    return first, last


def check_resolution(resolution: Any) -> Resolution:
    """A side of a square grid of tokens or (rows, columns); ValueError for other values."""
    sides = tuple(resolution) if isinstance(resolution, (tuple, list)) else (resolution, resolution)
    if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
        raise ValueError(f"resolutions: expected a number of tokens or (rows, columns), got {resolution!r}")
    return resolution if isinstance(resolution, int) else (sides[0], sides[1])


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf

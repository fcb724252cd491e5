"""Self-attention in which items of a batch read other items: what the training-free in-context methods share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ....bindings import Contrast, Control, Segments
from ...diffusers.protocol.batch_call import Part
from ...diffusers.protocol.layer import Layer
from ...diffusers.protocol.plan import Plan

Clip = tuple[float, float] | None
Resolution = int | tuple[int, int]
Window = tuple[int, int | None]
PLACES = ("down", "mid", "up")


class Reader(NamedTuple):
    """The batch item whose output is softmax(Q K^T) V, and the items that its Q, its K and its V are of."""

    item: int
    query: int
    keys: tuple[int, ...]  # several: joined in one softmax
    values: tuple[int, ...]  # one for each of `keys`


def read(layer: Layer, readers: Sequence[Reader], temperature: float, beta: float, clip: Clip) -> Plan:
    """The plan in which the readers, which have equally many keys, read others, and all other items
    themselves.

    With N tokens an item, n items of keys and d the head dim: P = softmax(QK^T / (temperature sqrt(d))) over
        all n N
    keys, of mean mu = 1/(n N) in every row, becomes clip(mu + beta (P - mu)), which weighs the values.
    """
    return _read(layer.image_len, layer.head_dim, tuple(readers), temperature, beta, clip)


@lru_cache(maxsize=256)
@torch.inference_mode(
    False
)  # kept beyond a call in inference mode, whose tensors would be of no use to a gradient
def _read(
    tokens: int, dim: int, readers: tuple[Reader, ...], temperature: float, beta: float, clip: Clip
) -> Plan:
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
    """Whether it is a UNet's self-attention in one of `places`; ValueError where the model is of another
    make.
    """
    if layer.kind not in ("self", "cross") or layer.place is None:
        raise ValueError(
            f"method: it is made for the self-attention of a UNet; layer {layer.index} is {layer.kind!r}"
        )
    return layer.kind == "self" and layer.place in places


def has_resolution(layer: Layer, resolution: Resolution) -> bool:
    """Whether the layer has resolution^2 tokens, or a grid of (rows, columns)."""
    return layer.grid == resolution if isinstance(resolution, tuple) else layer.image_len == resolution**2


def within(window: Window, step: int) -> bool:
    first, end = window
    return first <= step and (end is None or step < end)


def scaled(window: Window, share: float) -> Window:
    """The window of a run of `share` times as many steps."""
    first, end = window
    return round(share * first), None if end is None else round(share * end)


def checked(name: str, value: Any, roles: type) -> Any:
    """The canonical form of the knob `name`, as it is where the name is not known here.

    Args:
        roles: the class of what `items` holds.

    Raises:
        ValueError: a wrong value.
    """
    if name == "temperature" and not (is_number(value) and value > 0):
        raise ValueError(f"temperature: expected a finite number > 0, got {value!r}")
    if name == "contrast" and not is_number(value):
        raise ValueError(f"contrast: expected a finite number, got {value!r}")
    if name == "clip" and value is not None:
        Contrast(1.0, value)
        return tuple(value)
    if name == "places":
        places = several(value, str)
        if not places or set(places) - set(PLACES):
            raise ValueError(f"places: expected some of down, mid, up, got {value!r}")
        return places
    if name == "resolutions" and value is not None:
        resolutions = tuple(check_resolution(name, one) for one in several(value, int))
        if not resolutions:
            raise ValueError(
                f"resolutions: expected some numbers or pairs (rows, columns) of tokens, got {value!r}"
            )
        return resolutions
    if name == "steps":
        return check_window(name, value)
    if name == "items" and value is not None:
        items = several(value, roles)
        if not items or not all(isinstance(item, roles) for item in items):
            raise ValueError(f"items: expected one or several {roles.__name__}, got {value!r}")
        return items
    return value


def check_window(name: str, window: Any) -> Window:
    """(first step, the one after the last, or None); ValueError for other values."""
    first, end = window if isinstance(window, (tuple, list)) and len(window) == 2 else (-1, None)
    if not is_count(first) or not (end is None or (is_count(end) and end >= first)):
        raise ValueError(f"{name}: expected (first step, the one after the last or None), got {window!r}")
    return first, end


def check_resolution(name: str, resolution: Any) -> Resolution:
    """The side of a square of tokens, or (rows, columns); ValueError for other values."""
    sides = tuple(resolution) if isinstance(resolution, (tuple, list)) else (resolution, resolution)
    if len(sides) != 2 or not all(is_count(n) and n > 0 for n in sides):
        raise ValueError(
            f"{name}: expected a number of tokens > 0 or a pair (rows, columns), got {resolution!r}"
        )
    return resolution if isinstance(resolution, int) else (sides[0], sides[1])


def check_share(name: str, value: Any) -> float:
    """The number; ValueError where it is none in [0, 1]."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return float(value)


def check_items(name: str, items: Any) -> tuple[int, ...] | None:
    """Different batch items, or None; ValueError for other values."""
    if items is None:
        return None
    chosen = several(items, int)
    if not chosen or not all(map(is_count, chosen)) or len(set(chosen)) < len(chosen):
        raise ValueError(f"{name}: expected different batch items or None, got {items!r}")
    return chosen


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def several(value: Any, kind: type) -> tuple:
    """(value,) of that kind, or the values of an iterable, or none."""
    return (value,) if isinstance(value, kind) else tuple(value) if isinstance(value, Iterable) else ()

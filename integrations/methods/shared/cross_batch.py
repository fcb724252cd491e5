"""Attention in which items of a batch read queries, keys or values of other items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ....bindings import Contrast, Control, Segments
from ...diffusers.protocol.batch_call import Part
from ...diffusers.protocol.layer import Layer
from ...diffusers.protocol.plan import Plan
from .roles import EditRoles


class Reader(NamedTuple):
    """A batch item, and the items that its attention softmax(Q K^T) V takes Q, K and V from."""

    item: int
    query: int
    keys: tuple[int, ...]  # several: joined in one softmax
    values: tuple[int, ...]  # one for each of `keys`


def read(
    layer: Layer,
    readers: Sequence[Reader],
    temperature: float,
    beta: float,
    clip: tuple[float, float] | None,
) -> Plan:
    """Let the readers, which have equally many keys, read other items; all other items stay plain.

    With N tokens an item, n items of keys and the head dim d, the map over n N keys and its weights are

        P  = softmax(Q K^T / (temperature sqrt(d))),    whose rows have the mean mu = 1/(n N)
        P~ = clip(mu + beta (P - mu))
    """
    return _read(layer.image_len, layer.head_dim, tuple(readers), temperature, beta, clip)


# inference_mode(False), here and below: plans are cached, and inference tensors cannot be used in a backward
# pass.
@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _read(
    tokens: int,
    dim: int,
    readers: tuple[Reader, ...],
    temperature: float,
    beta: float,
    clip: tuple[float, float] | None,
) -> Plan:
    keys = torch.tensor([reader.keys for reader in readers]).unbind(1)
    values = torch.tensor([reader.values for reader in readers]).unbind(1)
    # Probabilities lie in (0, 1), where beta = 1 changes nothing; without contrast one sweep is enough.
    contrast = None if beta == 1 and clip in (None, (0, 1)) else Contrast(beta, clip)
    segments = Segments({f"item_{n}": tokens for n in range(1, len(keys) + 1)})
    part = Part(
        [reader.item for reader in readers],
        {"q": torch.tensor([reader.query for reader in readers]), "k": keys, "v": values},
        Control(Segments(tokens=tokens), segments, contrast=contrast),
        1 / (temperature * math.sqrt(dim)),
    )
    return Plan(parts=[part])


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def inject_maps(roles: tuple[EditRoles, ...]) -> Plan:
    """Each edit takes its source's attention map: o_tgt = softmax(Q_src K_src^T / sqrt(d)) V_tgt."""
    source = torch.tensor([pair.source for pair in roles])
    return Plan(parts=[Part([pair.target for pair in roles], {"q": source, "k": source})])


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def read_source(roles: tuple[EditRoles, ...], union: bool = False) -> Plan:
    """Each edit reads its source: o_tgt = softmax(Q_tgt K_src^T / sqrt(d)) V_src; with `union` itself too."""
    source, target = (torch.tensor([getattr(pair, name) for pair in roles]) for name in ("source", "target"))
    read = [source, target] if union else source
    return Plan(parts=[Part([pair.target for pair in roles], {"k": read, "v": read})])

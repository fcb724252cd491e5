"""Problem: one attention call, checked and lowered to tensors and static structure; what every backend takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .control import Contrast


@dataclass(frozen=True)
class GainRule:
    """HeadGain with its segments as indices."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    apply: tuple[int, ...]
    values: Tensor  # (2,) float32: span, floor
    norm: str

    @property
    def span(self) -> Tensor:
        return self.values[0]

    @property
    def floor(self) -> Tensor:
        return self.values[1]


@dataclass(eq=False)
class Problem:
    """B output items, H heads, M rows in R segments, N keys in C segments and G groups, head dim D. Nobody
    changes one in place; it is not frozen for the time that takes.

    Table entry [b, h] is read at [b or 0, h or 0] where its dimension is 1. Segment lengths differ from item
    to item where row_items or key_items is set. Key segment c lies in tensor 0 after its predecessors, or is
    tensor c of a list.
    """

    q: Tensor  # (batch, M, H, D)
    k: tuple[Tensor, ...]  # one (batch | 1, N, Hkv, D), or C of them (batch | 1, key_lengths[c], Hkv, D)
    v: tuple[Tensor, ...]
    batch: int  # B
    row_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    groups: tuple[int, ...]  # (C,) group of each key segment
    kinds: tuple[int, ...]  # (R * C,) -1 removed, 0 untouched, equal where the same entries apply
    contrast: tuple[Contrast | None, ...]  # (G,)
    scale: float
    scales: Tensor | None = None  # (1|B, 1|H) float32, in place of scale
    row_items: Tensor | None = None  # (B, R) int32
    key_items: Tensor | None = None  # (B, C) int32
    valid: Tensor | None = None  # (B, C) int32, keys of a segment that exist; EVERY cuts nothing
    bias: Tensor | None = None  # (1|B, 1|H, R, C) float32, -inf removes
    weight: Tensor | None = None  # (1|B, 1|H, R, C) float32
    gain: Tensor | None = None  # (1|B, 1|H, R) float32
    gates: Tensor | None = None  # (1|B, 1|M, G) float32
    head_gain: GainRule | None = None
    source_q: Tensor | None = None  # (B,) int64: output item b reads q[source_q[b]]
    source_k: Tensor | None = None  # (len(k), B) int64
    source_v: Tensor | None = None
    mask: Tensor | None = None  # bool or float, broadcastable to (B, H, M, N)
    need_stats: bool = False  # lse, mass and gain are returned to the caller
    out: Tensor | None = None  # (B, M, H, D) to write to, in place of a new tensor

    def changed(self, **fields) -> Problem:
        """The same with other values of some fields, without the time of dataclasses.replace, which shows in
        a short call.
        """
        new = object.__new__(Problem)
        new.__dict__.update(self.__dict__, **fields)
        return new

    @property
    def rows(self) -> int:
        return self.q.shape[1]

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k[0].shape[2]

    @property
    def dim(self) -> int:
        return self.q.shape[3]

    @property
    def keys(self) -> int:
        return sum(t.shape[1] for t in self.k)

    @property
    def n_groups(self) -> int:
        return len(self.contrast)

    @property
    def need_mass(self) -> bool:
        return self.need_stats or self.head_gain is not None

    def row_starts(self) -> tuple[int, ...]:
        """Start of each row segment, where all items agree."""
        return tuple(accumulate(self.row_lengths, initial=0))[:-1]

    def key_place(self, c: int) -> tuple[int, int]:
        """(tensor, start) of key segment c, where all items agree."""
        return (c, 0) if len(self.k) > 1 else (0, sum(self.key_lengths[:c]))

    def removed(self, r: int, c: int) -> bool:
        """Whether the pair is removed for every item and head, known without reading a table."""
        return self.kinds[r * len(self.key_lengths) + c] < 0

    def item_scale(self) -> Tensor:
        """(1|B, 1|H, 1, 1) in float64"""
        if self.scales is None:
            return torch.full((1, 1, 1, 1), self.scale, dtype=torch.float64, device=self.q.device)
        return self.scales.double()[:, :, None, None]


def default_scale(dim: int) -> float:
    return 1.0 / math.sqrt(dim)

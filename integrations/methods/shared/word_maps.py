"""Where chosen words are looked at: cross-attention maps of a few text tokens, gathered through Plan.see."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...diffusers.protocol.layer import Layer
from ...diffusers.protocol.plan import Plan, Seen
from . import cross_batch as borrowed
from .cross_batch import Resolution


class WordMaps:
    """Cross-attention maps of some items' words, without a map: the columns alone are computed.

    A map is a layer's mean over heads, summed over the words; each item's own attention, whatever a method
    does to it.

    Args:
        words: {item: text tokens}: items of a call's batch, from its end where negative, as that of the
            conditional half is; positions among the text tokens.
        resolution: of the layers, the side of a square of as many tokens or (rows, columns).

    Attributes:
        seen: how many layers' maps there are, each step's counted.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, words: Mapping[int, Sequence[int]], resolution: Resolution = 16) -> None:
        if not isinstance(words, Mapping) or not words:
            raise ValueError(f"words: expected {{item: text tokens}}, got {words!r}")
        for item, tokens in words.items():
            if isinstance(item, bool) or not isinstance(item, int):
                raise ValueError(f"words: expected items of the batch, got {item!r}")
            if (
                not isinstance(tokens, Sequence)
                or not tokens
                or not all(borrowed.is_count(n) for n in tokens)
            ):
                raise ValueError(
                    f"words[{item}]: expected positions of text tokens, at least one, got {tokens!r}"
                )
        self.words = {item: tuple(tokens) for item, tokens in words.items()}
        self.resolution = borrowed.check_resolution("resolution", resolution)
        self._last, self._grid = sys.maxsize, (0, 0)
        self.clear()

    def clear(self) -> None:
        """Forget what has been seen, as for a new image."""
        self._sums: Tensor | None = None
        self._mean: Tensor | None = None
        self.seen = 0

    def begins(self, layer: Layer) -> bool:
        """Whether the layer is the first that is planned of a forward call; to be asked for every layer that
        is.
        """
        first, self._last = layer.index <= self._last, layer.index
        return first

    def plan(self, layer: Layer) -> Plan | None:
        """The plan that gathers the layer's maps, None where it is none of them; ValueError for words beyond
        its text.
        """
        if layer.kind != "cross" or not borrowed.has_resolution(layer, self.resolution):
            return None
        for item, tokens in self.words.items():
            if not -layer.batch <= item < layer.batch or max(tokens) >= layer.text_len:
                raise ValueError(
                    f"words: expected items below {layer.batch} and tokens below {layer.text_len}, got {item}: {tokens}"
                )
        assert layer.grid is not None
        self._grid = layer.grid
        return Plan(see=self.see)

    def see(self, seen: Seen) -> None:
        """Add the maps of one layer of the call, as Plan.see."""
        if seen.again:
            return
        tokens = sorted({n for tokens in self.words.values() for n in tokens})
        with torch.no_grad():
            means = seen.probabilities(tokens).mean(1)  # (batch, rows, tokens)
        maps = [
            means[item][:, [tokens.index(n) for n in chosen]].sum(-1) for item, chosen in self.words.items()
        ]
        added = torch.stack(maps)
        self._sums = added if self._sums is None else self._sums + added
        self._mean = None
        self.seen += 1

    @property
    def mean(self) -> Tensor:
        """Of what has been seen, (items, rows, columns) float32, in the order of `words`, the same tensor
        until more is seen.

        ValueError before there is any map.
        """
        if self._sums is None:
            raise ValueError(
                f"words: no cross-attention layer of resolution {self.resolution} has been seen yet"
            )
        if self._mean is None:
            self._mean = (self._sums / self.seen).unflatten(1, self._grid)
        return self._mean

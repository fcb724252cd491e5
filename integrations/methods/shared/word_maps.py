"""Cross-attention maps of chosen words, gathered while a model runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...diffusers.protocol.layer import Layer
from ...diffusers.protocol.plan import Plan, Seen
from .knobs import Knob, Mask, Positions, Resolution
from .layers_and_steps import has_resolution


class WordMaps:
    """The cross-attention maps of some items' words, of which MasaCtrl makes masks.

    A map is one layer's mean over heads, summed over an item's words: each item's own attention, whatever a
    method changes. Only the words' columns of the map are computed.

    Args:
        words: {item: positions of its words among the text tokens}. Items count from the end of a call's
            batch where negative, as those of the conditional half do.
        resolution: which layers count: the side of a square of as many tokens, or (rows, columns).

    Attributes:
        seen: how many maps of layers were added, over all steps.

    Raises:
        ValueError: a wrong argument, by name. When the model is called: items or positions beyond the
            call's.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import MasaCtrl, WordMaps
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> words = WordMaps({-2: [2], -1: [2]})  # token 2 of the source and the edit, conditional
        >>> with apply(pipe.unet, MasaCtrl(masks=words, steps=(0, None))):
        ...     images = pipe(["a sitting cat", "a jumping cat"], num_inference_steps=2).images
        >>> words.mean.shape  # (items, rows, columns)
        torch.Size([2, 16, 16])
    """

    words: Mapping[int, Sequence[int]] = Positions("item", int)
    resolution: int | tuple[int, int] = Resolution(16)

    def __init__(self, words: Mapping[int, Sequence[int]], resolution: int | tuple[int, int] = 16) -> None:
        self.words, self.resolution = words, resolution
        self._last, self._grid = sys.maxsize, (0, 0)
        self.clear()

    def __repr__(self) -> str:
        return f"WordMaps({self.words}, {self.resolution})"

    def clear(self) -> None:
        """Forget all maps, as before a new image."""
        self._sums: Tensor | None = None
        self._mean: Tensor | None = None
        self.seen = 0

    def begins(self, layer: Layer) -> bool:
        """Whether the layer is the first planned of a forward call; call it once for every layer."""
        first, self._last = layer.index <= self._last, layer.index
        return first

    def plan(self, layer: Layer) -> Plan | None:
        """The plan that gathers the layer's maps; None where the layer does not count.

        Raises:
            ValueError: items beyond the batch, or positions beyond the text.
        """
        if layer.kind != "cross" or not has_resolution(layer, self.resolution):
            return None
        for item, tokens in self.words.items():
            if not -layer.batch <= item < layer.batch or max(tokens) >= layer.text_len:
                raise ValueError(
                    f"words: expected items below {layer.batch} and tokens below {layer.text_len}, "
                    f"got {item}: {tokens}"
                )
        assert layer.grid is not None
        self._grid = layer.grid
        return Plan(see=self.see)

    def see(self, seen: Seen) -> None:
        """Add the maps of one layer of the call; for Plan.see."""
        if seen.again:
            return
        tokens = sorted({n for tokens in self.words.values() for n in tokens})
        with torch.no_grad():
            means = seen.probabilities(tokens).mean(1)  # (batch, rows, tokens)
        maps = [
            means[item][:, [tokens.index(n) for n in chosen]].sum(-1) for item, chosen in self.words.items()
        ]
        added = torch.stack(maps)  # (items, rows)
        self._sums = added if self._sums is None else self._sums + added
        self._mean = None
        self.seen += 1

    @property
    def mean(self) -> Tensor:
        """The mean map of each item, (items, rows, columns) float32, in the order of `words`.

        It is the same tensor until another map is added.

        Raises:
            ValueError: no map was seen yet.
        """
        if self._sums is None:
            raise ValueError(
                f"words: no cross-attention layer of resolution {self.resolution} has been seen yet"
            )
        if self._mean is None:
            self._mean = (self._sums / self.seen).unflatten(1, self._grid)
        return self._mean


class MaskPair(Knob):
    """Masks of a source and its edit, bool (rows, columns) each, of which copies are kept; WordMaps of two
    items, from which masks are made; or None.
    """

    def __init__(self) -> None:
        super().__init__(None, expected="two bool tensors (rows, columns), WordMaps of two items")

    def convert(self, value: Any) -> tuple[Tensor, Tensor] | WordMaps:
        if isinstance(value, WordMaps):
            if len(value.words) != 2:
                raise ValueError
            return value
        source, target = value
        mask: Any = Mask("rows, columns")
        return mask.convert(source), mask.convert(target)

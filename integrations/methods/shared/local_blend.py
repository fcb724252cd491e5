"""LocalBlend of Prompt-to-Prompt (arXiv 2208.01626): an edit stays where the words that it is about are
looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...diffusers.protocol.layer import Layer, Step
from . import cross_batch as borrowed
from .cross_batch import Resolution
from .word_maps import WordMaps


class LocalBlend:
    """Fed by a method's plans; called on the latents after each step, as from a pipeline's callback.

        x_i <- x_0 + m (x_i - x_0),  m = any of the items 0 and i: pooled(map) > threshold max(pooled(map))

    The map is the mean of the words' cross-attention over heads, layers and the run's steps so far; it is
    pooled, by the maximum over 3 x 3 tokens, and resized to the latents by the nearest. Each item's own
    attention counts, as in the paper; the released code's are the maps that the method has made. Defaults are
    the code's.

    Args:
        words: text tokens of each image's words, first the source's, then each edit's; see
            token_alignment.word_tokens().
        threshold: in [0, 1]. resolution: of the layers, the side of a square of as many tokens or (rows,
            columns).

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self, words: Sequence[Sequence[int]], threshold: float = 0.3, resolution: Resolution = 16
    ) -> None:
        if not isinstance(words, Sequence) or len(words) < 2:
            raise ValueError(f"words: expected text tokens of the source and of each edit, got {words!r}")
        self.thresholds = (borrowed.check_share("threshold", threshold),) * len(words)
        # The conditional half of a call is its second one.
        self.maps = WordMaps({i - len(words): tokens for i, tokens in enumerate(words)}, resolution)

    def plan(self, layer: Layer, step: Step) -> Callable[..., Any] | None:
        """Plan.see of the layer, for which the method makes the plan; maps of an earlier run are forgotten at
        step 0.
        """
        if self.maps.begins(layer) and step.index == 0:
            self.maps.clear()
        plan = self.maps.plan(layer)
        return None if plan is None else plan.see

    def masks(self, size: tuple[int, int]) -> Tensor:
        """bool (images, 1, rows, columns), each image's own; ValueError before any map has been seen."""
        maps = F.interpolate(F.max_pool2d(self.maps.mean[:, None], 3, 1, 1), size)
        thresholds = torch.tensor(self.thresholds, device=maps.device).reshape(-1, 1, 1, 1)
        return maps > thresholds * maps.amax((2, 3), keepdim=True)

    def __call__(self, latents: Tensor) -> Tensor:
        """latents: (images, channels, rows, columns), without the unconditional half; a new tensor like it."""
        if len(latents) != len(self.maps.words):
            raise ValueError(
                f"latents: expected one for each of {len(self.maps.words)} images, got {len(latents)}"
            )
        masks = self.masks((latents.shape[2], latents.shape[3]))
        return latents[:1] + (masks[:1] | masks) * (latents - latents[:1])

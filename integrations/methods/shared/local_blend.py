"""Local blending: an edit changes the latents only where the image attends to its words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...diffusers.protocol.layer import Layer, Step
from .knobs import Share, checked
from .word_maps import WordMaps


class LocalBlend:
    """Prompt-to-Prompt's blending (arXiv 2208.01626): outside of the words' masks edits keep the source.

        x_i  <- x_0 + m (x_i - x_0),    m = mask_0 or mask_i
        mask_i = pooled(map_i) > threshold max(pooled(map_i))

    The map is the mean of the words' cross-attention over heads, layers and the run's steps so far. It is
    pooled by the maximum over 3 x 3 tokens and resized to the latents by nearest neighbours. The defaults
    are the released code's. Each item's own attention counts, as in the paper; the released code takes the
    maps that the method has edited.

    Pass it to the method, whose plans collect the maps, and call it on the latents after each step.

    Args:
        words: positions of each image's words among its text tokens, first the source's, then each edit's;
            token_alignment.word_tokens() finds them.
        threshold: share of the map's maximum, 0 to 1.
        resolution: which layers count: the side of a square of as many tokens, or (rows, columns).

    Raises:
        ValueError: a wrong argument, by name.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import LocalBlend, PromptEdit, PromptToPrompt
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> blend = LocalBlend([[2], [2]])  # "cat" and "dog": token 2 of both prompts
        >>> def keep_background(pipe, step, timestep, tensors):
        ...     return {"latents": blend(tensors["latents"])}
        >>> with apply(pipe.unet, PromptToPrompt(PromptEdit(), blend=blend)):
        ...     images = pipe(["a cat", "a dog"], num_inference_steps=2,
        ...         callback_on_step_end=keep_background).images
    """

    def __init__(
        self,
        words: Sequence[Sequence[int]],
        threshold: float = 0.3,
        resolution: int | tuple[int, int] = 16,
    ) -> None:
        if not isinstance(words, Sequence) or len(words) < 2:
            raise ValueError(f"words: expected text tokens of the source and of each edit, got {words!r}")
        self.thresholds = (checked("threshold", Share(), threshold),) * len(words)
        # Negative: the conditional half is the second half of a call's batch.
        self.maps = WordMaps({i - len(words): tokens for i, tokens in enumerate(words)}, resolution)

    def plan(self, layer: Layer, step: Step) -> Callable[..., Any] | None:
        """Plan.see for the layer, or None; at step 0 the maps of an earlier run are forgotten."""
        if self.maps.begins(layer) and step.index == 0:
            self.maps.clear()
        plan = self.maps.plan(layer)
        return None if plan is None else plan.see

    def masks(self, size: tuple[int, int]) -> Tensor:
        """Each image's own mask, bool (images, 1, rows, columns).

        Args:
            size: (rows, columns) of the latents.

        Raises:
            ValueError: no map was seen yet.
        """
        maps = F.interpolate(F.max_pool2d(self.maps.mean[:, None], 3, 1, 1), size)
        thresholds = torch.tensor(self.thresholds, device=maps.device).reshape(-1, 1, 1, 1)
        return maps > thresholds * maps.amax((2, 3), keepdim=True)

    def __call__(self, latents: Tensor) -> Tensor:
        """The blended latents, a new tensor.

        Args:
            latents: (images, channels, rows, columns), without the unconditional half.

        Raises:
            ValueError: another number of images; no map was seen yet.
        """
        if len(latents) != len(self.maps.words):
            raise ValueError(
                f"latents: expected one for each of {len(self.maps.words)} images, got {len(latents)}"
            )
        masks = self.masks((latents.shape[2], latents.shape[3]))
        return latents[:1] + (masks[:1] | masks) * (latents - latents[:1])


class MutualBlend(LocalBlend):
    """InfEdit's blending (arXiv 2312.04965) of the latents of [source, target, mutual].

    Where the mask of the target's words is True the target keeps its own latents; elsewhere it takes the
    mutual's where the mask of the mutual's words is True, else the source's. Maps are pooled and resized as
    in LocalBlend. Which of the two masks comes first, and whose attention counts, is our reading of the
    method.

    Pass it to InfEdit, whose plans collect the maps, and call it on the latents after each step.

    Args:
        target: positions of words among the target's text tokens.
        mutual: positions of words among the mutual's text tokens.
        target_threshold: share of the target's map's maximum, 0 to 1.
        mutual_threshold: share of the mutual's map's maximum, 0 to 1.
        resolution: which layers count: the side of a square of as many tokens, or (rows, columns).

    Raises:
        ValueError: a wrong argument, by name.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import InfEdit, MutualBlend, PromptEdit
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> blend = MutualBlend(target=[2], mutual=[2])
        >>> def blended(pipe, step, timestep, tensors):
        ...     return {"latents": blend(tensors["latents"])}
        >>> with apply(pipe.unet, InfEdit(PromptEdit(), blend=blend)):
        ...     images = pipe(["a cat", "a dog", "a dog"], num_inference_steps=2,
        ...         callback_on_step_end=blended).images
    """

    def __init__(
        self,
        target: Sequence[int],
        mutual: Sequence[int],
        target_threshold: float = 0.6,
        mutual_threshold: float = 0.6,
        resolution: int | tuple[int, int] = 16,
    ) -> None:
        super().__init__([target, mutual], resolution=resolution)
        self.thresholds = (
            checked("target_threshold", Share(), target_threshold),
            checked("mutual_threshold", Share(), mutual_threshold),
        )

    def __call__(self, latents: Tensor) -> Tensor:
        """The blended latents, a new tensor.

        Args:
            latents: (3, channels, rows, columns), without the unconditional half.

        Raises:
            ValueError: another number of images; no map was seen yet.
        """
        if len(latents) != 3:
            raise ValueError(
                f"latents: expected those of the source, the target and the mutual item, got {len(latents)}"
            )
        target, mutual = self.masks((latents.shape[2], latents.shape[3]))
        blended = torch.where(target, latents[1], torch.where(mutual, latents[2], latents[0]))
        return torch.stack([latents[0], blended, latents[2]])

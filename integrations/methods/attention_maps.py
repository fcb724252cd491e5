"""Attention maps of a few tokens, without computing the whole map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen
from .shared.knobs import Count, Flag, Layers, Positions, Window
from .shared.layers_and_steps import known_grid, within


class AttentionMap(NamedTuple):
    """How much one layer's image tokens attend to each name's tokens in one call: a record of AttentionMaps.

    Attributes:
        step: index of the step.
        layer: Layer.index.
        kind: Layer.kind.
        grid: (rows, columns) of the image tokens.
        values: (batch, heads or 1, names, image tokens) float32, on the model's device; NaN for a name whose
            tokens are not among the layer's keys.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import AttentionMaps
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> maps = AttentionMaps(text={"cat": [2]}, layers="up")
        >>> with apply(pipe.unet, maps):
        ...     images = pipe("a cat", num_inference_steps=2).images
        >>> first = maps.maps[0]
        >>> first.step, first.kind, first.grid
        (0, 'cross', (16, 16))
        >>> first.values.shape  # (batch, heads, names, image tokens)
        torch.Size([2, 4, 1, 256])
    """

    step: int
    layer: int
    kind: str
    grid: tuple[int, int]
    values: Tensor


@dataclass
class AttentionMaps:
    """Record how much of its attention each image token gives to chosen tokens of the text or the image.

    A value is the sum of plain attention's probabilities over a name's tokens. The attention is not changed.
    Together with another method, ``compose(method, maps)``, the values are from before that method's weights
    and biases.

    Args:
        text: {name: positions among the text tokens}, for layers that attend to text.
        image: {name: positions among the image tokens}, for layers that attend to the image.
        layers: kinds or places of Layer, or indices, as in apply(); None: all.
        steps: (first, the one after the last or None).
        every: record the first of these steps, and every `every`-th after it.
        heads: True: keep each head's map; False: keep their mean, as one head.
        maps: the records, in the order of the calls; clear it before another run.

    Raises:
        ValueError: a wrong knob, by name; a name in both `text` and `image`. When the model is called:
            positions beyond the tokens, a layer whose grid is not known (FLUX without ``handle.grid``).

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import AttentionMaps
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> maps = AttentionMaps(text={"cat": [2], "hat": [5]})
        >>> with apply(pipe.unet, maps):
        ...     images = pipe("a cat with a hat", num_inference_steps=2).images
        >>> maps.mean()["cat"].shape  # (batch, rows, columns)
        torch.Size([2, 16, 16])
    """

    text: Mapping[str, Sequence[int]] = Positions("name", str, {}, empty=True)
    image: Mapping[str, Sequence[int]] = Positions("name", str, {}, empty=True)
    layers: str | int | Sequence[str | int] | None = Layers()
    steps: tuple[int, int | None] = Window()
    every: int = Count(1, low=1)
    heads: bool = Flag(True)
    maps: list[AttentionMap] = field(default_factory=list, repr=False)

    def _knob_changes(self, name: str, value: Any) -> None:
        other = {"text": "image", "image": "text"}.get(name)
        if other is not None and (both := set(value) & set(getattr(self, other, ()))):
            raise ValueError(f"{name}: expected other names than in {other}, got {sorted(both)}")

    @property
    def names(self) -> list[str]:
        """The names of `text`, then those of `image`: their order in the values."""
        return [*self.text, *self.image]

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        wanted = self._positions(layer)
        layers: Any = self.layers
        chosen = layers is None or {layer.index, layer.kind, layer.place} & set(layers)
        now = within(self.steps, step.index) and (step.index - self.steps[0]) % self.every == 0
        if not wanted or not chosen or not now:
            return None
        known_grid(layer)
        return Plan(see=partial(self._keep, layer, step, wanted))

    def _positions(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """{name: positions among the layer's keys}, of the names that the layer has."""
        text: Mapping[str, Any] = {} if layer.kind == "self" else self.text
        image: Mapping[str, Any] = {} if layer.kind == "cross" else self.image
        for what, names, count in (("text", text, layer.text_len), ("image", image, layer.image_len)):
            if wrong := [name for name, positions in names.items() if max(positions) >= count]:
                raise ValueError(
                    f"{what}[{wrong[0]!r}]: expected positions below the {count} {what} tokens of the layer"
                )
        return dict(text) | {
            name: tuple(layer.text_len + n for n in positions) for name, positions in image.items()
        }

    @torch.compiler.disable()  # a growing list would cause a recompilation in every call
    @torch.no_grad()
    def _keep(self, layer: Layer, step: Step, wanted: dict[str, tuple[int, ...]], seen: Seen) -> None:
        if seen.again:
            return
        assert layer.grid is not None
        columns = seen.probabilities([n for positions in wanted.values() for n in positions])
        split = columns[:, :, -layer.image_len :].split([len(positions) for positions in wanted.values()], -1)
        summed = dict(zip(wanted, (part.sum(-1) for part in split), strict=True))
        nothing = torch.full_like(next(iter(summed.values())), torch.nan)
        values = torch.stack([summed.get(name, nothing) for name in self.names], 2)
        values = values if self.heads else values.mean(1, keepdim=True)
        self.maps.append(AttentionMap(step.index, layer.index, layer.kind, layer.grid, values))

    def mean(self, grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The mean map of each name: over heads, then over all layers and steps that have the name.

        Args:
            grid: (rows, columns) of the result, to which maps of other grids are resized bilinearly; None:
                the finest one recorded.

        Returns:
            A dict from name to (batch, rows, columns).

        Raises:
            RuntimeError: nothing was recorded.
        """
        if not self.maps:
            raise RuntimeError("maps: nothing was recorded: the knobs select no layer or step of the calls")
        grid = max(m.grid for m in self.maps) if grid is None else grid
        maps = []
        for m in self.maps:
            images = m.values.mean(1).unflatten(-1, m.grid)  # (batch, names, rows, columns)
            if m.grid != grid:
                images = F.interpolate(images, grid, mode="bilinear", align_corners=False)
            maps.append(images)
        mean = torch.stack(maps).nanmean(0)
        return {name: mean[:, i] for i, name in enumerate(self.names)}

"""Attention maps of a few tokens: where an image looks, without holding a whole map."""

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
from .shared.cross_batch import Window, check_window, is_count, within


class AttentionMap(NamedTuple):
    """What the image tokens of one layer attend to in one call."""

    step: int
    layer: int  # Layer.index
    kind: str  # Layer.kind
    grid: tuple[int, int]  # (rows, columns) of the image tokens
    # (batch, heads or 1, names, image tokens) float32, on the model's device; NaN: the layer has no such keys
    values: Tensor


@dataclass
class AttentionMaps:
    """How much of its attention each image token gives to chosen tokens: words of the prompt, regions of the
    image.

    Leaves the attention as it is; beside another method ``compose(method, maps)``. A value is the sum of
    plain attention's probabilities over a name's tokens, before that method's weights and bias.

    Args:
        text: {name: positions among the text tokens}, for layers that attend to text.
        image: {name: positions among the image tokens}, for layers that attend to the image.
        layers: kinds, places or indices, as in apply(); None: all.
        steps: (first, after the last or None). every: of these, the first and every so many.
        heads: keep each head's; False: their mean, as one.
        maps: what was seen, in the order of the calls; clear it before another run.

    Raises:
        ValueError: a name that is in both, positions that are no numbers >= 0, other steps. When the model is
            called: positions beyond the tokens, a layer whose grid is not known (FLUX without
            ``handle.grid``).
    """

    text: Mapping[str, Sequence[int]] = field(default_factory=dict)
    image: Mapping[str, Sequence[int]] = field(default_factory=dict)
    layers: str | int | Sequence[str | int] | None = None
    steps: Window = (0, None)
    every: int = 1
    heads: bool = True
    maps: list[AttentionMap] = field(default_factory=list, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "steps":
            value = check_window(name, value)
        if name == "every" and not (is_count(value) and value):
            raise ValueError(f"every: expected a number of steps > 0, got {value!r}")
        if name in ("text", "image"):
            value = {key: tuple(int(n) for n in positions) for key, positions in value.items()}
            if wrong := [key for key, positions in value.items() if not positions or min(positions) < 0]:
                raise ValueError(
                    f"{name}[{wrong[0]!r}]: expected positions >= 0, at least one, got {value[wrong[0]]}"
                )
            if both := set(value) & set(self.__dict__.get({"text": "image", "image": "text"}[name], ())):
                raise ValueError(f"{name}: expected other names than the other field's, got {sorted(both)}")
        if name == "layers" and isinstance(value, (str, int)):
            value = (value,)
        object.__setattr__(self, name, value)

    @property
    def names(self) -> list[str]:
        """Those of the text, then those of the image: the order in `maps`."""
        return [*self.text, *self.image]

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        wanted = self._positions(layer)
        chosen = self.layers is None or {layer.index, layer.kind, layer.place} & set(self.layers)  # type: ignore[arg-type]
        now = within(self.steps, step.index) and (step.index - self.steps[0]) % self.every == 0
        if not wanted or not chosen or not now:
            return None
        if layer.grid is None:
            raise ValueError("grid: the image's grid is not known; set handle.grid = (rows, columns)")
        return Plan(see=partial(self._keep, layer, step, wanted))

    def _positions(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Of the keys of each name that the layer has."""
        text: Mapping[str, Any] = {} if layer.kind == "self" else self.text
        image: Mapping[str, Any] = {} if layer.kind == "cross" else self.image
        for what, names, count in (("text", text, layer.text_len), ("image", image, layer.image_len)):
            if wrong := [name for name, positions in names.items() if max(positions) >= count]:
                raise ValueError(
                    f"{what}[{wrong[0]!r}]: expected positions below the {count} {what} tokens of layer {layer.index}"
                )
        return dict(text) | {
            name: tuple(layer.text_len + n for n in positions) for name, positions in image.items()
        }

    @torch.compiler.disable()  # a list that grows would be compiled anew in every call
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
        """{name: (batch, rows, columns)}: over heads, and then over all layers and steps that have the name.

        Args:
            grid: of the result, to which maps of other grids are resized bilinearly; None: the finest one
                seen.

        Raises:
            RuntimeError: nothing was seen.
        """
        if not self.maps:
            raise RuntimeError("maps: nothing was seen: no layer or step of the call was chosen")
        grid = max(m.grid for m in self.maps) if grid is None else grid
        maps = []
        for m in self.maps:
            images = m.values.mean(1).unflatten(-1, m.grid)  # (batch, names, rows, columns)
            maps.append(
                images
                if m.grid == grid
                else F.interpolate(images, grid, mode="bilinear", align_corners=False)
            )
        mean = torch.stack(maps).nanmean(0)
        return {name: mean[:, i] for i, name in enumerate(self.names)}

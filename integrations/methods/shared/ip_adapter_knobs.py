"""The knobs of IPAdapter: scales for layers, and masks for images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...diffusers.hosts.host import Site
from ...diffusers.protocol.layer import Layer
from .image_prompt import ImagePrompt
from .knobs import FrozenDict, Knob, is_number

Scale = float | Mapping[str | int, float]


class LayerScales(Knob):
    """A scale, or one for each adapter: a number, or {place, index or beginning of a layer's name: number}.

    Stored as a tuple; a single entry is for all adapters.
    """

    def __init__(self, default: Scale) -> None:
        super().__init__(
            default, expected="a finite number or mapping to them, for all or each of the adapters"
        )

    def convert(self, value: Any) -> tuple[Scale, ...]:
        scales = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        numbers = [n for one in scales for n in (one.values() if isinstance(one, Mapping) else [one])]
        if not scales or not all(map(is_number, numbers)):
            raise ValueError
        return tuple(FrozenDict(one) if isinstance(one, Mapping) else one for one in scales)


class AdapterMasks(Knob):
    """For each adapter None, or a tensor (1 or batch, images, rows, columns); stored as a tuple. Or None."""

    def __init__(self) -> None:
        super().__init__(None, expected="for each adapter None or a tensor (batch, images, rows, columns)")

    def convert(self, value: Any) -> tuple[Tensor | None, ...]:
        masks = tuple(value)
        if not all(m is None or (isinstance(m, Tensor) and m.dim() == 4) for m in masks):
            raise ValueError
        return masks


def check_adapters(
    name: str,
    prompts: Sequence[ImagePrompt],
    scale: Sequence[Scale] | None,
    masks: Sequence[Tensor | None] | None,
) -> None:
    """Check that the knobs are for the same adapters and images; None: not set.

    Args:
        name: of the knob that changes.
        prompts: the adapters.
        scale: stored by LayerScales.
        masks: stored by AdapterMasks.

    Raises:
        ValueError: they are not, or an adapter has no images.
    """
    if any(prompt.tokens is None for prompt in prompts):
        raise ValueError("prompts: expected ImagePrompt with images (showing), got one without")
    counts = {"prompts": len(prompts)}
    if scale is not None and len(scale) > 1:
        counts["scale"] = len(scale)
    if masks is not None:
        counts["masks"] = len(masks)
    for other, count in counts.items():
        if name in counts and counts[name] != count:
            raise ValueError(f"{name}: expected {count} adapters, as in {other}, got {counts[name]}")
    for prompt, mask in zip(prompts, masks or (), strict=False):
        if mask is not None and prompt.tokens is not None and mask.shape[1] != prompt.tokens.shape[1]:
            raise ValueError(
                f"masks: expected one for each of {prompt.tokens.shape[1]} images, got {mask.shape[1]}"
            )


def check_layers(scales: Sequence[Scale], sites: Sequence[Site], names: Sequence[str]) -> None:
    """Check that each key of the scales is for a layer of the model.

    Args:
        scales: stored by LayerScales.
        sites: the model's attention layers.
        names: the layers' names in the model.

    Raises:
        ValueError: a key that fits no layer.
    """
    for key in (key for scale in scales if isinstance(scale, Mapping) for key in scale):
        if not any(_fits(key, i, site.place, names[i]) for i, site in enumerate(sites)):
            raise ValueError(
                f"scale: expected a place, an index or the beginning of a layer's name, got {key!r}"
            )


def scale_at(scales: Sequence[Scale], adapter: int, layer: Layer, name: str) -> float:
    """An adapter's scale in a layer of this name: the last entry of a mapping that fits, or 0."""
    scale = scales[adapter if len(scales) > 1 else 0]
    if not isinstance(scale, Mapping):
        return float(scale)
    fitting = [n for key, n in scale.items() if _fits(key, layer.index, layer.place, name)]
    return float(fitting[-1]) if fitting else 0.0


def _fits(key: str | int, index: int, place: str | None, name: str) -> bool:
    return key in (place, index) or (isinstance(key, str) and f"{name}.".startswith(f"{key}."))

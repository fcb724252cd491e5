"""IP-Adapter (arXiv 2308.06721): images as prompts, each in a softmax of its own beside the text's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bindings import Control, Segments
from ..diffusers.hosts.registry import find_host
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.image_branch import ImageBranch
from .shared.image_prompt import ImagePrompt

Scale = float | Mapping[str | int, float]


@dataclass(eq=False)
class IPAdapter:
    """Decoupled cross-attention, all adapters and images in one launch. At image token i, in each head:

        o_i = softmax(q_i K_text^T) V_text + sum_a scale_a mask_a(i) softmax(q_i K_a^T) V_a

    In a UNet's cross-attention as it stands; in FLUX's double blocks the sum is added to the image after the
    block, with the queries as they are before RoPE. A mask is resized bicubically to the layer's grid, beyond
    0 and 1 too, as in diffusers. Several images of an adapter without masks share a softmax. A knob may be
    set at any time, `prompts` with
    other images too: their keys and values are made once. ValueError names a wrong one.

    Args:
        prompts: the adapters with their images.
        scale: one for all, or one for each adapter: a number, or, as InstantStyle sets layers apart, {"down",
            "mid", "up", Layer.index or the beginning of the name of a layer in the model: number}, of which
            the last that fits counts, and 0 where none does. diffusers' default is 1. A scale for each image
            is a factor of its mask.
        masks: for each adapter None, or (1 or batch, images, rows, columns) as
            IPAdapterMaskProcessor.preprocess makes them. FLUX's grid is Handle.grid.
    """

    prompts: Sequence[ImagePrompt]
    scale: Scale | Sequence[Scale] = 1.0
    masks: Sequence[Tensor | None] | None = None

    def __post_init__(self) -> None:
        self._names: list[str] = []  # of the model's layers
        self._kept: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # k and v of each adapter in each layer
        self._plans: dict[Layer, Plan | None] = {}
        self._branches: list[ImageBranch] = []  # of FLUX's double blocks

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "prompts":
            value = tuple(value)
            if not value or any(not isinstance(p, ImagePrompt) or p.tokens is None for p in value):
                raise ValueError(
                    "prompts: expected one or several ImagePrompt with images (showing), got others"
                )
            if len(value) != len(self.__dict__.get("scale", value)):
                raise ValueError(
                    f"prompts: expected {len(self.prompts)} adapters, as there are scales, got {len(value)}"
                )
            _check_masks(self.__dict__.get("masks"), value)
        if name == "scale":
            value = _scales(value, len(self.prompts))
        if name == "masks":
            _check_masks(value, self.prompts)
        object.__setattr__(self, name, value)
        if not name.startswith("_"):
            self.__dict__.update(_plans={}, **({"_kept": {}} if name == "prompts" else {}))

    def attach(self, model: nn.Module) -> list:
        """Learns the names of the model's layers; hooks on the double blocks of FLUX."""
        names, places = (
            {id(module): name for name, module in model.named_modules()},
            find_host(model).places(model),
        )
        self._names, self._kept, self._plans = [names[id(place.attn)] for place in places], {}, {}
        for key in (key for scale in self.scale if isinstance(scale, Mapping) for key in scale):  # type: ignore[union-attr]
            if not any(_fits(key, i, place.place, self._names[i]) for i, place in enumerate(places)):
                raise ValueError(
                    f"scale: expected a place, an index or the beginning of a layer's name, got {key!r}"
                )
        doubles = model.transformer_blocks if places[0].kind == "double" else ()
        self._branches = [ImageBranch(block) for block in doubles]  # type: ignore[union-attr]
        return list(self._branches)

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if layer.kind in ("joint", "added"):
            raise ValueError(
                f"IPAdapter: it is made for cross-attention and FLUX; layer {layer.index} is {layer.kind!r}"
            )
        if layer.kind in ("self", "single"):
            return None
        if layer not in self._plans:
            self._plans[layer] = self._plan(layer)
        return self._plans[layer]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _plan(self, layer: Layer) -> Plan | None:
        extra, gates = {}, {}
        for a, prompt in enumerate(self.prompts):
            scale, mask = self._scale(a, layer), None if self.masks is None else self.masks[a]
            if not scale:
                continue
            k, v = self._keys(a, layer, prompt)
            if mask is None:
                extra[f"ip_{a}"], gates[f"ip_{a}"] = (k.flatten(1, 2), v.flatten(1, 2)), scale
                continue
            if layer.grid is None:
                raise ValueError("masks: the image's grid is not known; set Handle.grid")
            small = F.interpolate(mask.float(), layer.grid, mode="bicubic").flatten(
                2
            )  # (1 or batch, images, rows)
            for i in range(mask.shape[1]):
                extra[f"ip_{a}_{i}"], gates[f"ip_{a}_{i}"] = (
                    (k[:, i], v[:, i]),
                    scale * small[:, i].to(k.device),
                )
        if not extra:
            return None
        own = {} if layer.kind == "double" else {"text": layer.text_len}
        keys = Segments(own | {name: k.shape[1] for name, (k, _) in extra.items()})
        control = Control(
            Segments(image=layer.image_len), keys, groups={name: [name] for name in keys}, gates=gates
        )
        if layer.kind != "double":
            return Plan(control, extra=extra)
        pairs = list(extra.values())
        device = pairs[0][0].device
        ask = self._branches[layer.index].ask
        return Plan(hidden=partial(ask, control.to(device), [k for k, _ in pairs], [v for _, v in pairs]))

    def _scale(self, a: int, layer: Layer) -> float:
        scale, name = self.scale[a], self._names[layer.index]  # type: ignore[index]
        if not isinstance(scale, Mapping):
            return float(scale)
        fits = [n for key, n in scale.items() if _fits(key, layer.index, layer.place, name)]
        return float(fits[-1]) if fits else 0.0

    def _keys(self, a: int, layer: Layer, prompt: ImagePrompt) -> tuple[Tensor, ...]:
        if (a, layer.index) not in self._kept:
            self._kept[a, layer.index] = prompt.project(self._names[layer.index], layer.heads)
        return self._kept[a, layer.index]


def _fits(key: str | int, index: int, place: str | None, name: str) -> bool:
    return key in (place, index) or (isinstance(key, str) and f"{name}.".startswith(f"{key}."))


def _scales(value: Any, count: int) -> tuple[Scale, ...]:
    scales = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    flat = [n for one in scales for n in (one.values() if isinstance(one, Mapping) else [one])]
    if len(scales) != count or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in flat):
        raise ValueError(
            f"scale: expected a number or mapping for all or each of {count} adapters, got {value!r}"
        )
    return scales


def _check_masks(masks: Sequence[Tensor | None] | None, prompts: Sequence[ImagePrompt]) -> None:
    if masks is None:
        return
    images = [0 if prompt.tokens is None else prompt.tokens.shape[1] for prompt in prompts]
    got = [None if m is None else m.shape[1] if isinstance(m, Tensor) and m.dim() == 4 else 0 for m in masks]
    if len(got) != len(images) or any(g not in (None, n) for g, n in zip(got, images, strict=True)):
        raise ValueError(
            f"masks: expected None or (batch, images, rows, columns) with {images} images, got {got}"
        )

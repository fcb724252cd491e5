"""IP-Adapter (arXiv 2308.06721): images as prompts, each in a softmax of its own beside the text's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bindings import Control, Segments
from ..diffusers.host import find_host
from ..diffusers.layer import Layer, Step
from ..diffusers.plan import Plan

Scale = float | Mapping[str | int, float]


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """One adapter's weights, loaded, and what it is shown.

    Attributes:
        weights: {name of a cross-attention layer in the model: (to_k, to_v), each (heads * head_dim, channels)}.
        projection: diffusers' module from an image encoder's output to tokens, or None.
        tokens: (batch or 1, images, tokens of an image, channels), see `showing`.
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    projection: nn.Module | None = None
    tokens: Tensor | None = None

    @staticmethod
    def load(unet: nn.Module, state: Mapping[str, Mapping[str, Tensor]]) -> ImagePrompt:
        """From the state dict of pipe.load_ip_adapter, {"image_proj": ..., "ip_adapter": {"1.to_k_ip.weight": ...}}.

        The model is left as it is: nothing is set on it.

        Raises:
            TypeError: a model that is no UNet: the adapters of FLUX and SD 3 are of another form.
            ValueError: weights for other layers, or others than keys and values (the LoRA of FaceID).
        """
        if not hasattr(unet, "mid_block"):
            raise TypeError(f"unet: IP-Adapters are for UNets here, got {type(unet).__name__}")
        # The published numbers count the layers, of both kinds, in the order of their names.
        names = [name.removesuffix(".processor") for name in unet.attn_processors]  # type: ignore[union-attr, operator]
        cross = [name for name in names if not name.endswith("attn1")]
        wanted = {f"{2 * i + 1}.to_{w}_ip.weight": (name, w) for i, name in enumerate(cross) for w in "kv"}
        if set(wanted) != set(state["ip_adapter"]):
            other = sorted(set(wanted) ^ set(state["ip_adapter"]))
            raise ValueError(f"state: expected to_k_ip and to_v_ip of {len(cross)} layers; missing or unknown: {other[0]}")
        like = next(unet.parameters())
        found = {place: state["ip_adapter"][key].detach().to(like) for key, place in wanted.items()}
        weights = {name: (found[name, "k"], found[name, "v"]) for name in cross}
        convert: Any = unet._convert_ip_adapter_image_proj_to_diffusers
        return ImagePrompt(weights, convert(state["image_proj"], low_cpu_mem_usage=False).to(like))

    def showing(self, embeds: Tensor | None = None, *, tokens: Tensor | None = None) -> ImagePrompt:
        """This adapter with images: their encoder's output (batch or 1, images, ...), or their tokens.

        With classifier-free guidance the batch has both halves, zeros or the encoding of a black image first.
        """
        if embeds is not None and self.projection is not None:
            with torch.no_grad():
                tokens = self.projection(embeds.flatten(0, 1)).unflatten(0, embeds.shape[:2])
        if tokens is None or tokens.dim() != 4:
            raise ValueError("showing: expected embeds for a projection, or tokens (batch, images, tokens, channels)")
        return ImagePrompt(self.weights, self.projection, tokens.detach())


@dataclass(eq=False)
class IPAdapter:
    """Decoupled cross-attention, all adapters and images in one launch. At image token i, in each head:

        o_i = softmax(q_i K_text^T) V_text + sum_a scale_a mask_a(i) softmax(q_i K_a^T) V_a

    A mask is resized bicubically to the layer's grid, beyond 0 and 1 too, as in diffusers. Several images of an adapter
    without masks share a softmax. A knob may be set at any time, `prompts` with other images too: their keys and values
    are made once. ValueError names a wrong one.

    Args:
        prompts: the adapters with their images.
        scale: one for all, or one for each adapter: a number, or, as InstantStyle sets layers apart, {"down", "mid",
            "up", Layer.index or the beginning of the name of a layer in the model: number}, later entries first, and 0
            where none fits. diffusers' default is 1. In a mask's place a scale per image is a factor of that mask.
        masks: for each adapter None, or (1 or batch, images, rows, columns) as IPAdapterMaskProcessor.preprocess makes them.
    """

    prompts: Sequence[ImagePrompt]
    scale: Scale | Sequence[Scale] = 1.0
    masks: Sequence[Tensor | None] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "prompts":
            value = tuple(value)
            if not value or any(not isinstance(p, ImagePrompt) or p.tokens is None for p in value):
                raise ValueError("prompts: expected one or several ImagePrompt with images (showing), got others")
        count = len(value if name == "prompts" else self.prompts)
        if name == "scale":
            value = tuple(value) if isinstance(value, Sequence) else (value,) * count
            flat = [n for one in value for n in (one.values() if isinstance(one, Mapping) else [one])]
            if len(value) != count or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in flat):
                raise ValueError(f"scale: expected a number or mapping for all or each of {count} adapters, got {value!r}")
        if name == "masks" and value is not None:
            images = [prompt.tokens.shape[1] for prompt in self.prompts]  # type: ignore[union-attr]
            got = [None if m is None else m.shape[1] if isinstance(m, Tensor) and m.dim() == 4 else 0 for m in value]
            if len(got) != count or any(g not in (None, n) for g, n in zip(got, images, strict=True)):
                raise ValueError(f"masks: expected None or (batch, images, rows, columns) with {images} images, got {got}")
        object.__setattr__(self, name, value)
        self.__dict__.update(_plans={}) if name != "prompts" else self.__dict__.update(_plans={}, _kept={})

    def attach(self, model: nn.Module) -> list:
        """Learns the names of the model's layers; there is nothing to remove."""
        names = {id(module): name for name, module in model.named_modules()}
        self.__dict__.update(_names=[names[id(place.attn)] for place in find_host(model).places(model)], _kept={}, _plans={})
        return []

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if layer.kind not in ("self", "cross") or layer.place is None:
            raise ValueError(f"IPAdapter: it is made for the cross-attention of a UNet; layer {layer.index} is {layer.kind!r}")
        if layer.kind == "self":
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
            small = F.interpolate(mask.float(), layer.grid, mode="bicubic").flatten(2)  # (1 or batch, images, rows)
            for i in range(mask.shape[1]):
                extra[f"ip_{a}_{i}"], gates[f"ip_{a}_{i}"] = (k[:, i], v[:, i]), scale * small[:, i].to(k.device)
        if not extra:
            return None
        keys = Segments({"text": layer.text_len} | {name: k.shape[1] for name, (k, _) in extra.items()})
        groups = {name: [name] for name in keys}
        return Plan(Control(Segments(image=layer.image_len), keys, groups=groups, gates=gates), extra=extra)

    def _scale(self, a: int, layer: Layer) -> float:
        scale, name = self.scale[a], self._names[layer.index]  # type: ignore[index]
        if not isinstance(scale, Mapping):
            return float(scale)
        fits = [n for key, n in scale.items()
                if key in (layer.place, layer.index) or (isinstance(key, str) and f"{name}.".startswith(f"{key}."))]  # fmt: skip
        return float(fits[-1]) if fits else 0.0

    def _keys(self, a: int, layer: Layer, prompt: ImagePrompt) -> tuple[Tensor, ...]:
        """k and v (batch or 1, images, tokens, heads, head_dim)"""
        if (a, layer.index) not in self._kept:
            name, tokens = self._names[layer.index], prompt.tokens
            if name not in prompt.weights:
                raise ValueError(f"prompts: adapter {a} has no weights for the layer {name}")
            kv = (F.linear(tokens.to(w), w).unflatten(-1, (layer.heads, -1)) for w in prompt.weights[name])  # type: ignore[union-attr]
            self._kept[a, layer.index] = tuple(kv)
        return self._kept[a, layer.index]

"""ImagePrompt: the weights of an IP-Adapter, and the images that it is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """One adapter's weights, loaded, and what it is shown.

    Attributes:
        weights: {name of an attention layer in the model: (to_k, to_v), each (heads * head_dim, channels)}.
        biases: the same for biases, of adapters that have them.
        projection: diffusers' module from an image encoder's output to tokens, or None.
        tokens: (batch or 1, images, tokens of an image, channels), see `showing`.
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    projection: nn.Module | None = None
    tokens: Tensor | None = None
    biases: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @staticmethod
    def load(
        model: nn.Module, state: Mapping[str, Mapping[str, Tensor]] | str | os.PathLike[str]
    ) -> ImagePrompt:
        """From a published file of safetensors, or the state dict of pipe.load_ip_adapter.

        The model is left as it is: nothing is set on it.

        Args:
            model: a UNet with cross-attention, or FLUX's transformer.
            state: a path, or {"image_proj": ..., "ip_adapter": {"1.to_k_ip.weight": ...}}.

        Raises:
            TypeError: another model: the adapters of SD 3 are of another form.
            ValueError: a file that is none of safetensors; weights for other layers, or others than keys and
                values (the LoRA of FaceID).
        """
        if not isinstance(state, Mapping):
            state = _read(Path(state))
        if set(state) != {"image_proj", "ip_adapter"}:
            raise ValueError(
                f"state: expected image_proj and ip_adapter, got {', '.join(sorted(map(str, state)))}"
            )
        parts: tuple[str, ...] = ("weight",)
        names = [name.removesuffix(".processor") for name in getattr(model, "attn_processors", ())]
        if hasattr(model, "mid_block"):
            # The published numbers count the layers, of both kinds, in the order of their names.
            numbered = {2 * i + 1: name for i, name in enumerate(n for n in names if not n.endswith("attn1"))}
        elif hasattr(model, "single_transformer_blocks"):
            numbered, parts = (
                dict(enumerate(n for n in names if n.startswith("transformer_blocks."))),
                ("weight", "bias"),
            )
        else:
            raise TypeError(f"model: IP-Adapters are for UNets and FLUX here, got {type(model).__name__}")
        wanted = {f"{i}.to_{w}_ip.{part}" for i in numbered for w in "kv" for part in parts}
        if wanted != set(state["ip_adapter"]):
            other = sorted(wanted ^ set(state["ip_adapter"]))
            raise ValueError(
                f"state: expected to_k_ip and to_v_ip of {len(numbered)} layers; missing or unknown: {other[0]}"
            )
        like = next(model.parameters())
        # An offloaded model's parameters may be nowhere.
        place = {"dtype": like.dtype, "device": None if like.is_meta else like.device}
        found = {key: t.detach().to(**place) for key, t in state["ip_adapter"].items()}
        weights, biases = (
            {
                name: (found[f"{i}.to_k_ip.{part}"], found[f"{i}.to_v_ip.{part}"])
                for i, name in numbered.items()
            }
            if part in parts
            else {}
            for part in ("weight", "bias")
        )
        convert: Any = model._convert_ip_adapter_image_proj_to_diffusers
        return ImagePrompt(
            weights, convert(state["image_proj"], low_cpu_mem_usage=False).to(**place), biases=biases
        )

    def showing(self, embeds: Tensor | None = None, *, tokens: Tensor | None = None) -> ImagePrompt:
        """This adapter with images: their encoder's output (batch or 1, images, ...), or their tokens.

        With classifier-free guidance the batch has both halves, zeros or the encoding of a black image first.
        """
        if embeds is not None and self.projection is not None:
            with torch.no_grad():
                tokens = self.projection(embeds.flatten(0, 1)).unflatten(0, embeds.shape[:2])
        if tokens is None or tokens.dim() != 4:
            raise ValueError(
                "showing: expected embeds for a projection, or tokens (batch, images, tokens, channels)"
            )
        return replace(self, tokens=tokens.detach())

    def project(self, layer: str, heads: int) -> tuple[Tensor, Tensor]:
        """k and v of a layer for what is shown, (batch or 1, images, tokens, heads, head_dim); ValueError
        without weights.
        """
        tokens = self.tokens
        if tokens is None or layer not in self.weights:
            raise ValueError(f"prompts: an adapter has no images, or no weights for the layer {layer}")
        pairs = zip(self.weights[layer], self.biases.get(layer, (None, None)), strict=True)
        k, v = (F.linear(tokens.to(w), w, b).unflatten(-1, (heads, -1)) for w, b in pairs)
        return k, v


# What published files call the two parts of a state dict.
PREFIXES = {
    "image_proj": "image_proj",
    "ip_adapter_proj_model": "image_proj",
    "ip_adapter": "ip_adapter",
    "double_blocks": "ip_adapter",
}


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"state: {path} is no file of safetensors: {error}") from error
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        prefix, _, rest = key.partition(".")
        if prefix not in PREFIXES:
            raise ValueError(
                f"state: expected names that begin with one of {', '.join(PREFIXES)}, got {key} in {path}"
            )
        rest = re.sub(r"processor\.ip_adapter_double_stream_([kv])_proj", r"to_\1_ip", rest)
        state[PREFIXES[prefix]][rest] = tensor
    return state

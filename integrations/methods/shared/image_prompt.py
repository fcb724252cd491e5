"""The weights of an IP-Adapter, and its images."""

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
    """The weights of one IP-Adapter (arXiv 2308.06721) and its images.

    Args:
        weights: {name of an attention layer in the model: (to_k, to_v), each (heads * head_dim, channels)}.
        projection: diffusers' module from an image encoder's output to tokens, or None.
        tokens: (batch or 1, images, tokens of an image, channels); None before `showing`.
        biases: {name of an attention layer: (to_k's, to_v's), each (heads * head_dim,)}, of adapters with
            biases.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations import ImagePrompt
        >>> layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
        >>> weights = {layer: (torch.randn(320, 768), torch.randn(320, 768))}  # to_k and to_v
        >>> prompt = ImagePrompt(weights)  # or ImagePrompt.load(), of a published file
        >>> prompt = prompt.showing(tokens=torch.randn(1, 2, 4, 768))  # two images of 4 tokens each
        >>> k, v = prompt.project(layer, heads=8)
        >>> k.shape
        torch.Size([1, 2, 4, 8, 40])
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    projection: nn.Module | None = None
    tokens: Tensor | None = None
    biases: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @staticmethod
    def load(
        model: nn.Module, state: Mapping[str, Mapping[str, Tensor]] | str | os.PathLike[str]
    ) -> ImagePrompt:
        """Read a published adapter; the model is not changed.

        Args:
            model: a UNet with cross-attention, or FLUX's transformer.
            state: the path of a safetensors file, or the state dict that pipe.load_ip_adapter takes,
                {"image_proj": ..., "ip_adapter": {"1.to_k_ip.weight": ...}}.

        Raises:
            TypeError: another model; SD 3's adapters have another form.
            ValueError: no safetensors file; weights for other layers, or other weights than of keys and
                values, such as FaceID's LoRA.
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
                f"state: expected to_k_ip and to_v_ip of {len(numbered)} layers; "
                f"missing or unknown: {other[0]}"
            )
        like = next(model.parameters())
        # An offloaded model's parameters may be on the meta device.
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
        """This adapter with images.

        With classifier-free guidance the batch holds both halves, first zeros or the encoding of a black
        image.

        Args:
            embeds: the image encoder's output, (batch or 1, images, ...), for an adapter with a projection.
            tokens: in its place the tokens, (batch or 1, images, tokens of an image, channels).

        Raises:
            ValueError: neither of them, or tokens of another shape.
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
        """k and v of the images in a layer, (batch or 1, images, tokens, heads, head_dim).

        Args:
            layer: name of the attention layer in the model.
            heads: of the layer.

        Raises:
            ValueError: no images, or no weights for the layer.
        """
        tokens = self.tokens
        if tokens is None or layer not in self.weights:
            raise ValueError(f"prompts: an adapter has no images, or no weights for the layer {layer}")
        pairs = zip(self.weights[layer], self.biases.get(layer, (None, None)), strict=True)
        k, v = (F.linear(tokens.to(w), w, b).unflatten(-1, (heads, -1)) for w, b in pairs)
        return k, v


def softmax_groups(
    name: str,
    pair: tuple[Tensor, Tensor],
    scale: float,
    mask: Tensor | None,
    grid: tuple[int, int] | None,
) -> dict[str, tuple[tuple[Tensor, Tensor], float | Tensor]]:
    """An adapter's softmax groups in a layer: one for all its images, or with a mask one for each.

    Args:
        name: of the adapter.
        pair: its k and v, (batch or 1, images, tokens, heads, head_dim).
        scale: of the adapter in this layer.
        mask: (batch or 1, images, rows, columns), or None.
        grid: (rows, columns) of the layer's image tokens, to which a mask is resized bicubically.

    Returns:
        {name: ((k, v), gate)}; k and v (batch or 1, keys, heads, head_dim), a gate is a number or (batch or
        1, image tokens).

    Raises:
        ValueError: a mask, but no grid.
    """
    k, v = pair
    if mask is None:
        return {name: ((k.flatten(1, 2), v.flatten(1, 2)), scale)}
    if grid is None:
        raise ValueError("masks: the grid of image tokens is not known; set handle.grid = (rows, columns)")
    gates = F.interpolate(mask.float(), grid, mode="bicubic").flatten(2)  # (batch or 1, images, image tokens)
    return {
        f"{name}_{i}": ((k[:, i], v[:, i]), scale * gates[:, i].to(k.device)) for i in range(mask.shape[1])
    }


# The first part of a name in published files, and the part of the state dict that it belongs to.
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
        raise ValueError(f"state: {path} is not a safetensors file: {error}") from error
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

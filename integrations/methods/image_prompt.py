"""ImagePrompt: the weights of an IP-Adapter, and the images that it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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

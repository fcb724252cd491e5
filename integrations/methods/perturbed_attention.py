"""PAG (arXiv 2403.17377): guidance away from a model whose image tokens attend to themselves alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from ...bindings import attention, merge
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.perturbed_guidance import Perturbed


@dataclass
class PerturbedAttention(Perturbed):
    """The self-attention map of the perturbed items is the identity.

        UNet:       o = V
        SD 3, FLUX: an image token attends to the text and to itself, a text token to all

    as in diffusers' PAG processors. Its newer guider differs: it takes V for the text tokens too, and in
    some steps only. The second attention of an SD 3.5 block, of the image alone, is as in a UNet. Guide
    with `perturbed_guidance.guide`, with a scale of 3 in the paper, and if wanted
    `perturbed_guidance.adaptive`. A knob may be set at any time.

    Args:
        layers: places or kinds of Layer, or its indices; of a UNet, self-attention only. None: "mid" in a
            UNet, layer 1 elsewhere, as the PAG pipelines of diffusers have it for SD, SDXL and SD 3.
        items: the perturbed items of a call. None: the last third of a batch [unconditional, conditional,
            perturbed], or with guided=False the last half of [conditional, perturbed].
        guided: whether a batch has an unconditional third; only read where `items` is None.
        steps: (first, the one after the last or None).

    Raises:
        ValueError: a wrong knob, by name. When the model is called: layers other than self-attention, a
            batch that does not fit.

    Examples:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import PerturbedAttention
        >>> from flashbrush.integrations.diffusers import apply
        >>> from flashbrush.integrations.methods.shared.perturbed_guidance import guide
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> latents = torch.randn(1, pipe.unet.config.in_channels, 16, 16)
        >>> text, empty = pipe.encode_prompt("a cat", "cpu", 1, True)
        >>> with apply(pipe.unet, PerturbedAttention()):
        ...     noise = pipe.unet(latents.repeat(3, 1, 1, 1), 500, torch.cat([empty, text, text])).sample
        >>> unconditional, conditional, perturbed = noise.chunk(3)
        >>> noise = guide(perturbed, conditional, unconditional, scale=3.0, guidance=7.5)
    """

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        items = self.perturbed(layer, step)
        return _plan(items, layer.image_len) if items else None


@lru_cache(maxsize=64)
def _plan(items: tuple[int, ...], image_len: int) -> Plan:
    return Plan(parts=[Part(items, attend=partial(_identity, image_len))])


def _identity(image_len: int, q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
    """An image token attends to [text ; itself], a text token to all; (batch, tokens, heads, head_dim)."""
    text_len = q.shape[1] - image_len
    if not text_len:
        return v  # one key a row: its probability is 1
    scale = q.shape[-1] ** -0.5
    text = attention(q[:, :text_len], k, v, scale=scale, backend=backend)
    rows = q[:, text_len:]
    image, stats = attention(
        rows, k[:, :text_len], v[:, :text_len], scale=scale, backend=backend, return_stats=True
    )
    itself = scale * (rows.float() * k[:, text_len:].float()).sum(-1).transpose(1, 2)  # (batch, heads, image)
    image, _ = merge([(image, stats.lse), (v[:, text_len:], itself[..., None])])
    return torch.cat([text, image], 1)

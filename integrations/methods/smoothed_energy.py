"""SEG (arXiv 2408.00760): guidance away from a model whose queries are blurred over the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

from ...bindings import query_blur
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.knobs import Number
from .shared.layers_and_steps import known_grid
from .shared.perturbed_guidance import Perturbed


@dataclass
class SmoothedEnergy(Perturbed):
    """The perturbed items' queries are blurred, which flattens the energy of their attention.

        o = softmax(G(Q) K^T / sqrt(d)) V

    G is a Gaussian over the grid of image tokens; query_blur() defines its taps. With an infinite sigma it is
    the mean: all rows are equal, and one is computed. In joint attention the text's queries are not blurred;
    diffusers' guider blurs them, and has its two branches swapped. Guide with `perturbed_guidance.guide`,
    with a scale of 3 in the paper. A knob may be set at any time.

    Args:
        layers: places or kinds of Layer, or its indices; of a UNet, self-attention only. None: "mid" in a
            UNet, layer 1 elsewhere.
        items: the perturbed items of a call. None: the last third of a batch [unconditional, conditional,
            perturbed], or with guided=False the last half of [conditional, perturbed].
        guided: whether a batch has an unconditional third; only read where `items` is None.
        steps: (first, the one after the last or None).
        sigma: in tokens, >= 0. 0: plain. More than 9999 is infinite, as in the released code, whose default
            it is.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: layers other than self-attention, a
            batch that does not fit, a grid that is not known (FLUX without ``handle.grid``).

    Examples:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import SmoothedEnergy
        >>> from flashbrush.integrations.diffusers import apply
        >>> from flashbrush.integrations.methods.shared.perturbed_guidance import guide
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> latents = torch.randn(1, pipe.unet.config.in_channels, 16, 16)
        >>> text, empty = pipe.encode_prompt("a cat", "cpu", 1, True)
        >>> with apply(pipe.unet, SmoothedEnergy(sigma=1.0)):
        ...     noise = pipe.unet(latents.repeat(3, 1, 1, 1), 500, torch.cat([empty, text, text])).sample
        >>> unconditional, conditional, perturbed = noise.chunk(3)
        >>> noise = guide(perturbed, conditional, unconditional, scale=3.0, guidance=7.5)
    """

    sigma: float = Number(math.inf, low=0, infinite=True)

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        items = self.perturbed(layer, step)
        if not items or not self.sigma:
            return None
        sigma = math.inf if self.sigma > 9999 else float(self.sigma)
        return _plan(items, layer.rows - layer.image_len, known_grid(layer), sigma)


@lru_cache(maxsize=64)
def _plan(items: tuple[int, ...], text_len: int, grid: tuple[int, int], sigma: float) -> Plan:
    blur = partial(query_blur, grid=grid, sigma=sigma, tokens=slice(text_len, None))
    return Plan(parts=[Part(items, query=blur)])

"""PAG (arXiv 2403.17377): guidance away from a model whose image tokens see only themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.perturbed import Perturbed


@dataclass
class PerturbedAttention(Perturbed):
    """The self-attention map of the perturbed items is the identity.

        UNet:       o = V
        SD 3, FLUX: an image token sees the text and itself, a text token sees all, as diffusers' SD 3
            processor does

    Around it, `perturbed.guide` with the scale 3 of the paper and, if wanted, `perturbed.adaptive`.
    diffusers' newer
    guider differs from its processors, which this follows: it takes V for the text tokens too, in some steps
        only. The
    second attention of an SD 3.5 block, of the image alone, is as in a UNet. A knob may be set at any time;
    ValueError names a wrong one.

    Args: those of Perturbed.
    """

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        items = self.perturbed(layer, step)
        return _plan(items, layer.image_len) if items else None


@lru_cache(maxsize=64)
def _plan(items: tuple[int, ...], image_len: int) -> Plan:
    return Plan(parts=[Part(items, isolated=image_len)])

"""SAG (arXiv 2210.00939): guidance away from the image blurred where its own self-attention looks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusers.hosts.registry import find_host
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen
from .shared import cross_batch as borrowed


@dataclass
class SelfAttentionGuidance:
    """Reads how much attention each token of the image receives; the attention itself stays plain.

        c_j = mean over heads of sum_i P_ij,   mask_j = c_j > threshold         in the middle block's first self-attention

    A step has two calls of the model: of the latents, after which `mask` is read, and of `degrade`'s result,
        whose
    prediction `guide` leads away from. The paper blurs the latents, the released code the estimate of the
    clean ones and adds the predicted noise again, which is what `degrade` does. With classifier-free guidance
    the unconditional items'
    map counts: `mask(...)[:n]`. A knob may be set at any time; ValueError names a wrong one.

    Args:
        threshold: the released code's; c_j is 1 in the mean.
        layer: Layer.index of the self-attention that is read; None: the first of a UNet's middle block.
    """

    threshold: float = 1.0
    layer: int | None = None

    def __post_init__(self) -> None:
        self.mass: Tensor | None = None  # (batch, tokens) of the last call
        self._middle, self._grid = -1, (0, 0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "threshold" and not (
            isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
        ):
            raise ValueError(f"threshold: expected a finite number >= 0, got {value!r}")
        if name == "layer" and value is not None and not borrowed.is_count(value):
            raise ValueError(f"layer: expected the index of a layer or None, got {value!r}")
        object.__setattr__(self, name, value)

    def attach(self, model: nn.Module) -> list:
        """Finds the model's middle block; there is nothing to remove."""
        places = find_host(model).places(model)
        self._middle = next(
            (i for i, place in enumerate(places) if (place.kind, place.place) == ("self", "mid")), -1
        )
        return []

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if layer.index != (self._middle if self.layer is None else self.layer):
            return None
        if layer.kind != "self" or layer.grid is None:
            raise ValueError(
                f"layer: expected one of self-attention over a grid, layer {layer.index} is {layer.kind!r}"
            )
        self._grid = layer.grid
        return Plan(see=self._see)

    def _see(self, seen: Seen) -> None:
        self.mass = seen.column_mass().mean(1)

    def mask(self, height: int, width: int) -> Tensor:
        """(batch, 1, height, width) float32, 1 where the image of the last call looked, resized by nearest
        neighbours.

        Raises:
            RuntimeError: no call has been seen, as where the model has no self-attention in a middle block.
        """
        if self.mass is None:
            raise RuntimeError(
                "SelfAttentionGuidance: no layer was read; is the method applied, and has a UNet's middle "
                "block self-attention? layer= chooses another"
            )
        chosen = (self.mass > self.threshold).float().unflatten(1, (1, *self._grid))
        return F.interpolate(chosen, (height, width))


def degrade(
    latents: Tensor, noise: Tensor, mask: Tensor, alpha_bar: float | Tensor, taps: int = 9, sigma: float = 1.0
) -> Tensor:
    """The latents with their estimate of the clean ones blurred where the mask is 1, and the same noise.

    Args:
        latents, noise: x_t and the predicted epsilon, (batch, channels, rows, columns); what another
            parametrisation predicts is to be turned into epsilon first.
        mask: (batch or 1, 1, rows, columns).
        alpha_bar: the scheduler's cumulative alpha at t.
        taps, sigma: of the Gaussian, whose borders are reflected; the released code's. Sides must be over
            taps // 2.
    """
    alpha = torch.as_tensor(alpha_bar, dtype=torch.float32, device=latents.device).to(latents.dtype)
    clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    line = torch.exp(-0.5 * ((torch.arange(taps, device=latents.device) - taps // 2) / sigma) ** 2)
    line = (line / line.sum()).to(latents.dtype).expand(latents.shape[1], 1, 1, -1)
    padded = F.pad(clean, (taps // 2,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, line, groups=latents.shape[1]), line.mT, groups=latents.shape[1])
    mask = mask.to(latents.dtype)
    return alpha.sqrt() * (mask * blurred + (1 - mask) * clean) + (1 - alpha).sqrt() * noise


def guide(
    noise: Tensor,
    degraded: Tensor,
    conditional: Tensor | None = None,
    scale: float = 0.75,
    guidance: float = 1.0,
) -> Tensor:
    """u + guidance (c - u) + scale (u - d); without classifier-free guidance e + scale (e - d).

    Args:
        noise, degraded: u, or e: the unconditional prediction or the only one, and d, that of the degraded
            latents under the same condition. conditional: c.
        scale: the paper's. guidance: the classifier-free guidance scale.
    """
    base = noise if conditional is None else noise + guidance * (conditional - noise)
    return base + scale * (noise - degraded)

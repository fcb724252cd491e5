"""SAG (arXiv 2210.00939): guidance away from the image blurred where its own self-attention is high."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusers.hosts.registry import find_host
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen
from .shared.knobs import Count, Number


@dataclass
class SelfAttentionGuidance:
    """Read how much attention each token of the image receives; the attention itself stays plain.

        c_j = mean over heads of sum_i P_ij,   mask_j = c_j > threshold

    in the middle block's first self-attention.

    A step calls the model twice: with the latents, after which `mask` is read, and with the latents that
    `degrade` returns. `guide` leads away from the prediction for these. The paper blurs the latents; the
    released code, and `degrade`, blur the estimate of the clean latents and add the predicted noise again.
    With classifier-free guidance the unconditional items' mask counts: `mask(...)[:n]`. A knob may be set at
    any time.

    Args:
        threshold: of c_j, whose mean is 1; >= 0. The released code has 1.
        layer: Layer.index of the self-attention that is read; None: the first of a UNet's middle block.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: `layer` is not self-attention.

    Examples:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import SelfAttentionGuidance
        >>> from flashbrush.integrations.diffusers import apply
        >>> from flashbrush.integrations.methods.self_attention_guidance import degrade, guide
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> latents = torch.randn(1, pipe.unet.config.in_channels, 16, 16)
        >>> text, empty = pipe.encode_prompt("a cat", "cpu", 1, True)
        >>> method = SelfAttentionGuidance()
        >>> with apply(pipe.unet, method):
        ...     noise = pipe.unet(latents, 500, text).sample
        ...     alpha_bar = pipe.scheduler.alphas_cumprod[500]
        ...     worse = degrade(latents, noise, method.mask(16, 16), alpha_bar)
        ...     noise = guide(noise, pipe.unet(worse, 500, text).sample)
    """

    threshold: float = Number(1.0, low=0)
    layer: int | None = Count(None)

    def __post_init__(self) -> None:
        self.mass: Tensor | None = None  # (batch, tokens) of the last call
        self._middle, self._grid = -1, (0, 0)

    def attach(self, model: nn.Module) -> list:
        """Find the model's middle block; no hook is registered."""
        places = find_host(model).sites(model)
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
        """The mask of the last call, resized to the latents by nearest neighbour.

        Args:
            height: rows of the latents.
            width: columns of the latents.

        Returns:
            (batch, 1, height, width) float32, 1 where c_j exceeds the threshold and 0 elsewhere.

        Raises:
            RuntimeError: no layer was read, as where the model has no self-attention in a middle block.
        """
        if self.mass is None:
            raise RuntimeError(
                "SelfAttentionGuidance: no layer was read; is the method applied, and does the UNet's "
                "middle block have self-attention? layer= chooses another"
            )
        chosen = (self.mass > self.threshold).float().unflatten(1, (1, *self._grid))
        return F.interpolate(chosen, (height, width))


def degrade(
    latents: Tensor, noise: Tensor, mask: Tensor, alpha_bar: float | Tensor, taps: int = 9, sigma: float = 1.0
) -> Tensor:
    """The latents with their estimate of the clean ones blurred where the mask is 1, and the same noise.

    Args:
        latents: x_t, (batch, channels, rows, columns); rows and columns more than taps // 2.
        noise: the predicted epsilon, the same shape; another parametrisation's prediction must be
            converted.
        mask: (batch or 1, 1, rows, columns).
        alpha_bar: the scheduler's cumulative alpha at t.
        taps: of the Gaussian, whose borders are reflected; the released code's 9.
        sigma: of the Gaussian, in latents; the released code's 1.

    Returns:
        The degraded latents, of the latents' shape.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.self_attention_guidance import degrade
        >>> latents, noise = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
        >>> same = degrade(latents, noise, torch.zeros(1, 1, 16, 16), alpha_bar=0.5)  # an empty mask
        >>> torch.allclose(same, latents, atol=1e-5)
        True
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
        noise: u, the unconditional prediction; or e, the only one.
        degraded: d, the prediction for the degraded latents under the same condition.
        conditional: c, or None.
        scale: of the degradation; 0.75 in the paper.
        guidance: the scale of classifier-free guidance.

    Returns:
        The guided prediction, of the same shape.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.self_attention_guidance import guide
        >>> guide(torch.tensor(2.0), torch.tensor(1.0))
        tensor(2.7500)
    """
    base = noise if conditional is None else noise + guidance * (conditional - noise)
    return base + scale * (noise - degraded)

"""Guidance away from a model whose attention is perturbed: what PAG and SEG share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...diffusers.protocol.layer import Layer, Step
from .knobs import Flag, Items, Layers, Window
from .layers_and_steps import within


@dataclass
class Perturbed:
    """Which items of a batch are perturbed, in which layers and steps.

    Args:
        layers: places or kinds of Layer, or its indices; of a UNet, self-attention only. None: "mid" in a
            UNet, layer 1 elsewhere, as the PAG pipelines of diffusers have it for SD, SDXL and SD 3.
        items: the perturbed items of a call. None: the last third of a batch [unconditional, conditional,
            perturbed], or with guided=False the last half of [conditional, perturbed].
        guided: whether a batch has an unconditional third; only read where `items` is None.
        steps: (first, the one after the last or None).
    """

    layers: Sequence[str | int] | None = Layers("self", "joint", "double", "single")
    items: Sequence[int] | None = Items()
    guided: bool = Flag(True)
    steps: tuple[int, int | None] = Window()

    def perturbed(self, layer: Layer, step: Step) -> tuple[int, ...]:
        """The items that are perturbed in this layer and step; () for none."""
        if not within(self.steps, step.index):
            return ()
        layers = self.layers or (("mid",) if layer.place is not None else (1,))
        named = layer.place in layers or layer.kind in layers
        if not named and layer.index not in layers:
            return ()
        if layer.kind == "added" or (layer.kind == "cross" and layer.index in layers):
            raise ValueError(
                f"layers: expected layers of self-attention; layer {layer.index} is {layer.kind!r}"
            )
        if layer.kind == "cross":
            return ()
        if self.items is not None:
            return tuple(self.items)
        parts = 3 if self.guided else 2
        if layer.batch % parts:
            raise ValueError(f"items: without them a batch has {parts} equal parts, got {layer.batch} items")
        return tuple(range(layer.batch - layer.batch // parts, layer.batch))


def guide(
    perturbed: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None = None,
    *,
    scale: float,
    guidance: float = 1.0,
) -> Tensor:
    """u + guidance (c - u) + scale (c - p); without classifier-free guidance c + scale (c - p).

    Args:
        perturbed: p, the perturbed prediction of the noise or the velocity.
        conditional: c, the same shape.
        unconditional: u, the same shape, or None.
        scale: of the perturbation; 3 in both papers' pipelines. See `adaptive`.
        guidance: the scale of classifier-free guidance.

    Returns:
        The guided prediction, of the same shape.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.shared.perturbed_guidance import guide
        >>> guide(torch.tensor(1.0), torch.tensor(2.0), scale=3.0)
        tensor(5.)
    """
    base = conditional if unconditional is None else unconditional + guidance * (conditional - unconditional)
    return base + scale * (conditional - perturbed)


def adaptive(scale: float, timestep: float, decay: float, timesteps: int = 1000) -> float:
    """max(0, scale - decay (timesteps - timestep)): PAG's scale, which falls as the image forms.

    Args:
        scale: at the noisiest timestep.
        timestep: 0 to `timesteps`.
        decay: loss of the scale per timestep; 0 keeps it.
        timesteps: of the training schedule.

    Returns:
        The scale at `timestep`.

    Examples:
        >>> from flashbrush.integrations.methods.shared.perturbed_guidance import adaptive
        >>> adaptive(3.0, timestep=500, decay=0.004)
        1.0
    """
    return max(0.0, scale - decay * (timesteps - timestep))

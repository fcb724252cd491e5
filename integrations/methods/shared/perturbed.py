"""Guidance away from a model whose attention is perturbed: what PAG and SEG share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...diffusers.protocol.layer import Layer, Step
from . import cross_batch as borrowed
from .cross_batch import Window

NAMES = ("down", "mid", "up", "self", "joint", "double", "single")


@dataclass
class Perturbed:
    """Which items of a batch are perturbed, and where.

    Args:
        layers: places or kinds of Layer, or its indices; of a UNet, self-attention only. None: "mid" in a
            UNet, the layer 1 elsewhere, as the PAG pipelines of diffusers have it for SD, SDXL and SD 3.
        items: the perturbed items of a call. None: the last third of a batch [unconditional, conditional,
            perturbed], without classifier-free guidance (guided=False) the last half of [conditional,
            perturbed].
        guided: see `items`.
        steps: (first, after the last or None).
    """

    layers: Sequence[str | int] | None = None
    items: Sequence[int] | None = None
    guided: bool = True
    steps: Window = (0, None)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, self.checked(name, value))

    def checked(self, name: str, value: Any) -> Any:
        """The knob's canonical form; ValueError for a wrong value."""
        if name == "steps":
            return borrowed.check_window(name, value)
        if name == "guided" and not isinstance(value, bool):
            raise ValueError(f"guided: expected True or False, got {value!r}")
        if name == "layers" and value is not None:
            chosen = (
                (value,)
                if isinstance(value, str | int)
                else tuple(value)
                if isinstance(value, Iterable)
                else ()
            )
            if not chosen or not all(
                one in NAMES if isinstance(one, str) else borrowed.is_count(one) for one in chosen
            ):
                raise ValueError(
                    f"layers: expected some of {', '.join(NAMES)} and indices, or None, got {value!r}"
                )
            return chosen
        return borrowed.check_items(name, value) if name == "items" else value

    def perturbed(self, layer: Layer, step: Step) -> tuple[int, ...]:
        """The items that are perturbed in this layer; () for none."""
        if not borrowed.within(self.steps, step.index):
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
        sorts = 3 if self.guided else 2
        if layer.batch % sorts:
            raise ValueError(
                f"items: without them a batch has {sorts} equal parts, which {layer.batch} items have not"
            )
        return tuple(range(layer.batch - layer.batch // sorts, layer.batch))


def guide(
    perturbed: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None = None,
    *,
    scale: float,
    guidance: float = 1.0,
) -> Tensor:
    """u + guidance (c - u) + scale (c - p), without classifier-free guidance c + scale (c - p).

    Args:
        perturbed, conditional, unconditional: p, c and u, predictions of the noise or the velocity.
        scale: of the perturbation, see `adaptive`; both papers' pipelines have 3.
        guidance: the classifier-free guidance scale.
    """
    base = conditional if unconditional is None else unconditional + guidance * (conditional - unconditional)
    return base + scale * (conditional - perturbed)


def adaptive(scale: float, timestep: float, decay: float, timesteps: int = 1000) -> float:
    """max(0, scale - decay (timesteps - timestep)): PAG's scale, which falls as the image forms; decay=0
    keeps it.
    """
    return max(0.0, scale - decay * (timesteps - timestep))

"""What apply() must know of an architecture: where its attention layers are, and what a call's inputs say.

To add an architecture, write one file beside flux.py with

1. a processor: a subclass of ControlledProcessor whose __call__ has the stock processor's signature
   (diffusers filters joint_attention_kwargs by it) and does the stock processor's work around the attention
   itself: projections; `join`, which normalises the streams, joins them as [text ; image], adds the plan's
   offset and rotates; `self.attend`; output projections, in the model's own order of outputs;
2. a Host: the model's class, that processor, the stock processors it may replace, `places`, `geometry` and
    `grids`;

and name the model's class in registry.py. The tests that every architecture must pass are those of
tests/.../test_flux.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class Place(NamedTuple):
    """An attention module that holds a processor."""

    attn: Any
    kind: str  # Layer.kind
    place: str | None = None  # "down", "mid", "up"
    level: int = 0  # index into Geometry.grids: how often the image has been halved before


class Geometry(NamedTuple):
    """Shapes of one forward call of the model."""

    text_len: int
    image_len: int  # where `grids` is empty
    batch: int
    device: torch.device
    grids: tuple[
        tuple[int, int], ...
    ] = ()  # (rows, columns) of the image tokens on each level, where they are known


class Host(Protocol):
    model_class: type[nn.Module]
    processor_class: type
    stock: tuple[type, ...]  # processors of which ours is a drop-in
    takes_tokens: bool  # whether the image comes as a sequence of tokens, whose grid the model is not told

    @staticmethod
    def places(model: nn.Module) -> list[Place]:
        """All attention layers, in the order of the forward pass; NotImplementedError for what they do that
        ours cannot.
        """
        ...

    @staticmethod
    def geometry(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Geometry:
        """From the arguments of model.forward, reading shapes only."""
        ...

    @staticmethod
    def grids(model: nn.Module, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
        """Geometry.grids for latents of that size; () where the model takes tokens."""
        ...

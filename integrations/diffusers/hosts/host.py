"""Host: what apply() needs from an architecture. To add one:

1. Copy flux.py. In its processor, `__call__` has the stock processor's signature (diffusers filters
   joint_attention_kwargs by it). Project each stream, hand the streams to `attend` in the order [text ;
   image], split the result and project it out, in the model's own order of outputs.
2. In its Host, fill in the model class, the processor, the stock processors that it may replace, `sites`,
   `geometry` and `grids`.
3. Name the model class in registry.py.
4. Add one entry to tests/integrations/diffusers/hosts/entries.py and run
   `pytest tests/integrations/diffusers/hosts/test_contract.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class Site(NamedTuple):
    """An attention module of the model, which holds a processor.

    Attributes:
        attn: the module.
        kind: Layer.kind.
        place: Layer.place: "down", "mid", "up", or None.
        level: index into Geometry.grids: how often the image was halved before this layer.
    """

    attn: Any
    kind: str
    place: str | None = None
    level: int = 0


class Geometry(NamedTuple):
    """Sizes of one forward call of the model.

    Attributes:
        text_len: text tokens.
        image_len: image tokens, where `grids` is empty.
        batch: items of the call.
        device: where the inputs are.
        grids: (rows, columns) of the image tokens on each level; () where the inputs do not say.
    """

    text_len: int
    image_len: int
    batch: int
    device: torch.device
    grids: tuple[tuple[int, int], ...] = ()


class Host(Protocol):
    """One architecture.

    Attributes:
        model_class: the model's class in diffusers.
        processor_class: a ControlledProcessor.
        stock: diffusers' processors that ours can replace.
        takes_tokens: the model's image input is a sequence of tokens whose grid is not among its inputs.
    """

    model_class: type[nn.Module]
    processor_class: type
    stock: tuple[type, ...]
    takes_tokens: bool

    @staticmethod
    def sites(model: nn.Module) -> list[Site]:
        """All attention modules, in the order of the forward pass.

        Raises:
            NotImplementedError: the model has attention that our processor cannot compute.
        """
        ...

    @staticmethod
    def geometry(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Geometry:
        """The sizes of a call, from the arguments of model.forward; reads shapes only."""
        ...

    @staticmethod
    def grids(model: nn.Module, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
        """Geometry.grids for latents of that size; () where the model takes tokens."""
        ...

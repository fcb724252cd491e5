"""UNet attention that materialises its maps, layer by layer, as an edit of the maps of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..diffusers.tiny_images import unet_call
from .eager_unet import run

# From q, k, v (batch, heads, rows or keys, dim) to (batch, heads, rows, dim)
Edit = Callable[[Tensor, Tensor, Tensor], Tensor]


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """The map, (..., rows, keys)"""
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)


@dataclass
class EagerEdit:
    edit: Edit

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        return attn.to_out[0](self.edit(q, k, v).transpose(1, 2).flatten(2))


def layers_of(model: UNet2DConditionModel) -> list[Any]:
    """All attention layers in the order of the forward pass."""
    ordered: list[Any] = [*model.down_blocks, model.mid_block, *model.up_blocks]  # type: ignore[misc]
    return [module for block in ordered for module in block.modules() if isinstance(module, Attention)]


@contextmanager
def editing(model: UNet2DConditionModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """The edits in the layers of these places."""
    layers = {i: layer for i, layer in enumerate(layers_of(model)) if i in edits}
    assert len(layers) == len(edits)
    stock = {i: layer.processor for i, layer in layers.items()}
    for i, layer in layers.items():
        layer.processor = EagerEdit(edits[i])
    try:
        yield
    finally:
        for i, layer in layers.items():
            layer.processor = stock[i]


def worst_edit(model: UNet2DConditionModel, call: dict, edits: Mapping[int, Edit]) -> float:
    """How far the model as it is strays from the edits in any one layer that is given the same input."""
    errors: list[float] = []

    def compare(layer, args, kwargs, output, edit: Edit) -> None:
        text = kwargs.get("encoder_hidden_states")
        expected = EagerEdit(edit)(layer, args[0], text)
        errors.append(float((output - expected).abs().max() / expected.abs().max()))

    layers = layers_of(model)
    hooks = [
        layers[i].register_forward_hook(
            lambda layer, args, kwargs, output, edit=edit: compare(layer, args, kwargs, output, edit),
            with_kwargs=True,
        )
        for i, edit in edits.items()
    ]
    try:
        run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(errors) == len(edits)
    return max(errors)


def largest_tensor(model: UNet2DConditionModel, batch: int = 4, side: int = 32) -> int:
    """Elements of the largest one that any of torch's operators returns in a call with side * side tokens an
    image.
    """
    sizes = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in (out if isinstance(out, (tuple, list)) else (out,))
                if isinstance(t, Tensor)
            )
            return out

    call = unet_call(model, batch=batch, side=(side, side))
    with Sizes():
        run(model, call)
    return max(sizes)

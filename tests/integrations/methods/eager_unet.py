"""UNet self-attention that materialises its map and lets one item of the batch read others, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor


@dataclass
class EagerReader:
    """Item `item` has the queries of `query`, reads the values of `values` by the keys of `keys`.

    The rows of its map are stretched about their mean by `beta`, then clipped.
    """

    item: int
    query: int
    keys: Sequence[int]
    values: Sequence[int]
    temperature: float
    beta: float
    clip: tuple[float, float] | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(heads, tokens, dim) from q, k, v (batch, heads, tokens, dim)"""
        joined_k = torch.cat([k[n] for n in self.keys], 1)
        joined_v = torch.cat([v[n] for n in self.values], 1)
        prob = torch.softmax(q[self.query] @ joined_k.mT / (self.temperature * math.sqrt(q.shape[-1])), -1)
        mean = prob.mean(-1, keepdim=True)
        prob = mean + self.beta * (prob - mean)
        if self.clip is not None:
            prob = prob.clamp(*self.clip)
        return prob @ joined_v


@dataclass
class EagerProcessor:
    readers: Sequence[EagerReader]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

        q, k, v = (split(linear(hidden_states)) for linear in (attn.to_q, attn.to_k, attn.to_v))
        out = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
        for reader in self.readers:
            out[reader.item] = reader(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@torch.no_grad()
def run(model: UNet2DConditionModel, call: dict) -> tuple[Tensor, list[Tensor]]:
    """(output, what each attention layer returned)"""
    seen: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_hook(lambda module, inputs, output: seen.append(output)) for layer in layers]
    try:
        return model(**call, return_dict=False)[0], seen
    finally:
        for hook in hooks:
            hook.remove()


def run_eager(
    model: UNet2DConditionModel, call: dict, readers: Sequence[EagerReader], chosen: Callable[[str], bool]
) -> tuple[Tensor, list[Tensor]]:
    """run() with the readers in the self-attention layers whose name is `chosen`."""
    layers = [m for name, m in model.named_modules() if isinstance(m, Attention) and name.endswith("attn1") and chosen(name)]
    assert layers
    stock = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = EagerProcessor(readers)
    try:
        return run(model, call)
    finally:
        for layer, processor in zip(layers, stock, strict=True):
            layer.processor = processor


def changed(mine: list[Tensor], plain: list[Tensor]) -> list[int]:
    """The attention layers, in the order of the forward pass, whose output differs."""
    return [i for i, (a, b) in enumerate(zip(mine, plain, strict=True)) if float((a - b).abs().max() / b.abs().max()) > 1e-5]

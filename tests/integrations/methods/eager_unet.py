"""UNet self-attention that materialises its map and lets one item of the batch read others, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

Chosen = Callable[[str], bool]  # by a layer's name


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

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

        q, k, v = (split(linear(hidden_states)) for linear in (attn.to_q, attn.to_k, attn.to_v))
        # Item by item, so that no more than one map is held.
        out = torch.stack(
            [
                torch.softmax(a @ b.mT / math.sqrt(a.shape[-1]), -1) @ c
                for a, b, c in zip(q, k, v, strict=True)
            ]
        )
        for reader in self.readers:
            out[reader.item] = reader(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@torch.no_grad()
def run(model: UNet2DConditionModel, call: dict) -> tuple[Tensor, list[Tensor]]:
    """(output, what each attention layer returned)"""
    seen: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output)) for layer in layers
    ]
    try:
        return model(**call, return_dict=False)[0], seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def reading(model: UNet2DConditionModel, readers: Sequence[EagerReader], chosen: Chosen) -> Iterator[None]:
    """The readers in the self-attention layers whose name is `chosen`."""
    layers = self_attention(model, chosen)
    stock = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = EagerProcessor(readers)
    try:
        yield
    finally:
        for layer, processor in zip(layers, stock, strict=True):
            layer.processor = processor


def run_eager(
    model: UNet2DConditionModel, call: dict, readers: Sequence[EagerReader], chosen: Chosen
) -> tuple[Tensor, list[Tensor]]:
    with reading(model, readers, chosen):
        return run(model, call)


def worst_layer(
    model: UNet2DConditionModel, call: dict, readers: Sequence[EagerReader], chosen: Chosen
) -> float:
    """How far the model as it is strays from the readers in any one layer that is given the same input."""
    errors: list[float] = []

    def compare(layer, inputs, output) -> None:
        expected = EagerProcessor(readers)(layer, inputs[0])
        errors.append(float((output - expected).abs().max() / expected.abs().max()))

    layers = self_attention(model, chosen)
    hooks = [layer.register_forward_hook(compare) for layer in layers]
    try:
        run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(errors) == len(layers)
    return max(errors)


def self_attention(model: UNet2DConditionModel, chosen: Chosen) -> list[Any]:
    layers = [
        m
        for name, m in model.named_modules()
        if isinstance(m, Attention) and name.endswith("attn1") and chosen(name)
    ]
    assert layers
    return layers


def sample(
    model: UNet2DConditionModel, call: dict, steps: int, start: Callable[[int], object] = int
) -> Tensor:
    """The latents after a short run of DDIM from call["sample"]; `start` is told the index of each step
    before it.
    """
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    latents = call["sample"]
    for i, t in enumerate(scheduler.timesteps):
        start(i)
        noise, _ = run(model, call | {"sample": latents, "timestep": t})
        latents = scheduler.step(noise, t, latents).prev_sample  # type: ignore[arg-type, union-attr]
    return latents


def changed(mine: list[Tensor], plain: list[Tensor]) -> list[int]:
    """The attention layers, in the order of the forward pass, whose output differs."""
    return [
        i
        for i, (a, b) in enumerate(zip(mine, plain, strict=True))
        if float((a - b).abs().max() / b.abs().max()) > 1e-5
    ]

"""FLUX attention that materialises its map, step by step, for methods to change; and a look at what layers
return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..tiny import TEXT, forward, relative

Rope = tuple[Tensor, Tensor]


class EagerLayer:
    """In place of a FLUX processor; plain as it is. q, k, v are (batch, heads, tokens, dim) of [text ;
    image].
    """

    def __init__(self, index: int, text: int = TEXT) -> None:
        self.index, self.text = index, text

    def states(self, image: Tensor) -> Tensor:
        """Of the image tokens, before the projections."""
        return image

    def offset(self, x: Tensor) -> Tensor:
        """q or k after the norm, before RoPE."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """From q and k before RoPE."""
        return weigh(rotate(q, rope), rotate(k, rope), v)

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        def split(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

        if encoder_hidden_states is None:
            text, image = hidden_states[:, : self.text], hidden_states[:, self.text :]
            hidden_states = torch.cat([text, self.states(image)], 1)
        else:
            hidden_states = self.states(hidden_states)
        q, k, v = (split(linear(hidden_states)) for linear in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (split(linear(encoder_hidden_states)) for linear in linears)
            q = torch.cat([attn.norm_added_q(text_q), q], 2)
            k = torch.cat([attn.norm_added_k(text_k), k], 2)
            v = torch.cat([text_v, v], 2)
        out = self.attend(self.offset(q), self.offset(k), v, image_rotary_emb).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, self.text :]), attn.to_add_out(out[:, : self.text])


def weigh(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + bias, -1) @ v


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE on neighbouring pairs of x (batch, heads, tokens, dim), as a product of complex numbers."""
    cos, sin = (t[:, ::2] for t in rope)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


def layers_of(model: Any) -> list[Any]:
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


@contextmanager
def eagerly(model: Any, make: Callable[[int], EagerLayer]) -> Iterator[Sequence[EagerLayer]]:
    """make(layer's index) in place of each processor."""
    layers = layers_of(model)
    stock = [layer.processor for layer in layers]
    eager = [make(i) for i in range(len(layers))]
    for layer, processor in zip(layers, eager, strict=True):
        layer.processor = processor
    try:
        yield eager
    finally:
        for layer, processor in zip(layers, stock, strict=True):
            layer.processor = processor


def worst_layer(model: Any, call: dict[str, Tensor], eager: Sequence[EagerLayer]) -> float:
    """How far the model as it is strays from the eager layers in any one that is given the same input."""
    errors: list[float] = []

    def compare(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
        expected = eager[len(seen)](layer, *args, **kwargs)
        seen.append(layer)
        for mine, theirs in zip(
            *((t if isinstance(t, tuple) else (t,)) for t in (output, expected)), strict=True
        ):
            errors.append(relative(mine, theirs))

    seen: list[Any] = []
    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers_of(model)]
    try:
        forward(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(eager)
    return max(errors)


def euler(
    model: Any,
    call: dict[str, Tensor],
    latents: Tensor,
    times: Sequence[float],
    before: Callable[[int, Tensor], Tensor] = lambda step, latents: latents,
) -> Iterator[Tensor]:
    """The latents at each of the times, from the first on; `before` may change them ahead of each step."""
    yield latents
    for step, (now, then) in enumerate(pairwise(times)):
        latents = before(step, latents)
        time = torch.full((latents.shape[0],), now)
        latents = latents + (then - now) * forward(model, call | {"hidden_states": latents, "timestep": time})
        yield latents

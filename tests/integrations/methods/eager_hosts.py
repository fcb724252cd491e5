"""Attention of UNets, SD 3 and FLUX whose core is a function that materialises its map; runs, and comparisons
with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..tiny import TEXT as FLUX_TEXT  # of tiny_call; a single block is not told


@dataclass
class Site:
    """An attention layer, as an eager core sees it."""

    name: str  # of the module
    attn: Any
    text_len: int = 0  # tokens of text among rows and keys; 0 in self-attention
    cross: bool = False  # whether the keys are the text alone
    heads: int = 1


# (site, q, k, v), each (batch, heads, tokens, dim) and joined as [text ; image]: the output, of q's shape
Core = Callable[[Site, Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + bias, -1) @ v


def plain(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


class EagerProcessor:
    def __init__(self, site: Site, core: Core) -> None:
        self.site, self.core = site, core

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        image_rotary_emb=None,
    ):
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        if isinstance(temb, tuple):
            image_rotary_emb = temb  # the fifth argument in FLUX
        text = encoder_hidden_states
        unet = "Flux" not in type(attn).__name__ and getattr(attn, "add_k_proj", None) is None
        cross = unet and text is not None and attn.is_cross_attention
        context = text if cross else hidden_states
        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        q, k = (norm(x) if callable(norm) else x for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        text_len = 0
        if text is not None and not cross:
            text_len = text.shape[1]
            tq, tk, tv = (split(p(text)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
            if attn.norm_added_q is not None:
                tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
            q, k, v = torch.cat([tq, q], 2), torch.cat([tk, k], 2), torch.cat([tv, v], 2)
        if image_rotary_emb is not None:
            q, k = apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)
        single = getattr(attn, "pre_only", False)
        site = replace(self.site, text_len=FLUX_TEXT if single else text_len, cross=cross, heads=attn.heads)
        out = self.core(site, q, k, v).transpose(1, 2).flatten(2)
        if single:
            return out
        image = attn.to_out[1](attn.to_out[0](out[:, text_len:]))
        if not text_len:
            return image
        return image, out[:, :text_len] if attn.context_pre_only else attn.to_add_out(out[:, :text_len])


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "processor")}


@contextmanager
def eager(model: nn.Module, core: Core) -> Iterator[None]:
    stock = {name: attn.processor for name, attn in layers(model).items()}
    for name, attn in layers(model).items():
        attn.processor = EagerProcessor(Site(name, attn), core)
    try:
        yield
    finally:
        for name, attn in layers(model).items():
            attn.processor = stock[name]


@torch.no_grad()
def run(model: nn.Module, call: dict) -> Tensor:
    return model(**call, return_dict=False)[0]


def run_eager(model: nn.Module, call: dict, core: Core) -> Tensor:
    with eager(model, core):
        return run(model, call)


def worst_layer(model: nn.Module, call: dict, core: Core) -> float:
    """How far any layer of the model as it is strays from the core that is given the same input, relative."""
    errors: list[float] = []

    def compare(name: str) -> Callable:
        def hook(attn, args, kwargs, output) -> None:
            expected = EagerProcessor(Site(name, attn), core)(attn, *args, **kwargs)
            mine, theirs = (t if isinstance(t, tuple) else (t,) for t in (output, expected))
            errors.extend(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, theirs, strict=True)
            )

        return hook

    hooks = [
        attn.register_forward_hook(compare(name), with_kwargs=True) for name, attn in layers(model).items()
    ]
    try:
        run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(errors) >= len(hooks)
    return max(errors)


def changed_layers(model: nn.Module, call: dict) -> list[str]:
    """The layers of the model as it is whose output is not that of plain attention on the same input."""
    names: list[str] = []

    def compare(name: str) -> Callable:
        def hook(attn, args, kwargs, output) -> None:
            expected = EagerProcessor(Site(name, attn), plain)(attn, *args, **kwargs)
            mine, theirs = (t if isinstance(t, tuple) else (t,) for t in (output, expected))
            if any(
                float((a - b).abs().max() / b.abs().max()) > 1e-4 for a, b in zip(mine, theirs, strict=True)
            ):
                names.append(name)

        return hook

    hooks = [
        attn.register_forward_hook(compare(name), with_kwargs=True) for name, attn in layers(model).items()
    ]
    try:
        run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    return names


def descend(step: Callable[[Tensor, int], Tensor], start: Tensor, count: int = 3) -> Tensor:
    """A short run: x <- x - step(x, i) / (2 count), i = 0, 1, ..."""
    x = start
    for i in range(count):
        x = x - step(x, i) / (2 * count)
    return x


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and 0 not in t.stride():
                self.elements = max(self.elements, t.numel())
        return out

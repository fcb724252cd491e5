"""Attention written out with its map, in place of diffusers' processors: the oracles of the methods' tests.

A core is a function of a site and of q, k, v, each (batch, heads, tokens, dim) and joined as [text ;
image], that returns the output, of q's shape. `eagerly` puts one into the layers of a UNet, of SD 3 or of
FLUX. Nothing here comes from flashbrush.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..tiny import TEXT as FLUX_TEXT  # of tiny_call: a single block's inputs do not contain it

Rope = tuple[Tensor, Tensor]  # cos, sin: (tokens, dim)


@dataclass(frozen=True)
class Site:
    """One attention layer."""

    name: str  # of the module
    index: int  # in the order of the forward pass
    attn: Any = field(repr=False)
    text_len: int = 0  # text tokens among rows and keys; 0 in self- and cross-attention
    cross: bool = False  # the keys are the text alone

    @property
    def is_self(self) -> bool:
        """Whether it is a UNet's self-attention."""
        return self.name.endswith("attn1")


Core = Callable[[Site, Tensor, Tensor, Tensor], Tensor]
Where = Callable[[Site], bool]
Edit = Callable[[Tensor, Tensor, Tensor], Tensor]  # a core that is the same in every layer


def everywhere(site: Site) -> bool:
    return True


# Attention


def probabilities(q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """The map, (..., rows, keys)"""
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + bias, -1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return probabilities(q, k, bias) @ v


def plain(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """RoPE on neighbouring pairs of x (batch, heads, tokens, dim), as a product of complex numbers."""
    if rope is None:
        return x
    cos, sin = (t[:, ::2] for t in rope)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


class FluxCore:
    """A core that also changes what comes before the attention; the base class is plain."""

    def states(self, site: Site, image: Tensor) -> Tensor:
        """The image's hidden states that q, k and v are projected from, (batch, image tokens, channels)."""
        return image

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        """The output from q and k before RoPE."""
        return self(site, rotate(q, rope), rotate(k, rope), v)

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


@dataclass
class Reader:
    """Item `item` has the queries of `query` and reads the values of `values` by the keys of `keys`.

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


def reading(*readers: Reader) -> Core:
    """The readers' items read others, all other items are plain; one map is held at a time."""

    def core(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.stack([attend(*one) for one in zip(q, k, v, strict=True)])
        for reader in readers:
            out[reader.item] = reader(q, k, v)
        return out

    return core


# In a model


@dataclass
class EagerProcessor:
    site: Site
    core: Core

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states: Any = None,
        attention_mask=None,
        temb=None,
        image_rotary_emb=None,
    ):
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        if isinstance(temb, tuple):
            image_rotary_emb = temb  # the fifth argument in FLUX
        text = encoder_hidden_states
        flux = "Flux" in type(attn).__name__
        single = flux and attn.pre_only
        cross = not flux and getattr(attn, "add_k_proj", None) is None and attn.is_cross_attention
        joint = text is not None and not cross
        text_len = FLUX_TEXT if single else text.shape[1] if joint and text is not None else 0
        site = replace(self.site, text_len=text_len, cross=cross and text is not None)
        if (states := getattr(self.core, "states", None)) is not None:
            ahead = text_len if single else 0
            image = states(site, hidden_states[:, ahead:])
            hidden_states = torch.cat([hidden_states[:, :ahead], image], 1)
        context = text if site.cross else hidden_states
        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        q, k = (norm(x) if callable(norm) else x for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        if joint:
            tq, tk, tv = (split(p(text)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
            if attn.norm_added_q is not None:
                tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
            q, k, v = torch.cat([tq, q], 2), torch.cat([tk, k], 2), torch.cat([tv, v], 2)
        if isinstance(self.core, FluxCore):
            out = self.core.attend(site, q, k, v, image_rotary_emb)
        else:
            out = self.core(site, rotate(q, image_rotary_emb), rotate(k, image_rotary_emb), v)
        out = out.transpose(1, 2).flatten(2)
        if single:
            return out
        image = attn.to_out[1](attn.to_out[0](out[:, text_len:]))
        if not joint:
            return image
        return image, out[:, :text_len] if attn.context_pre_only else attn.to_add_out(out[:, :text_len])


def sites_of(model: nn.Module, where: Where = everywhere) -> list[Site]:
    """The attention layers in the order of the forward pass."""
    names = [name for name, module in model.named_modules() if hasattr(module, "processor")]
    order = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")
    names.sort(key=lambda name: order.index(name.partition(".")[0]))  # stable
    found = [Site(name, i, model.get_submodule(name)) for i, name in enumerate(names)]
    chosen = [site for site in found if where(site)]
    assert chosen
    return chosen


@contextmanager
def eagerly(model: nn.Module, core: Core, where: Where = everywhere) -> Iterator[None]:
    """The core in place of the processors."""
    sites = sites_of(model, where)
    stock = [site.attn.processor for site in sites]
    for site in sites:
        site.attn.processor = EagerProcessor(site, core)
    try:
        yield
    finally:
        for site, processor in zip(sites, stock, strict=True):
            site.attn.processor = processor


@contextmanager
def editing(model: nn.Module, edits: Mapping[int, Edit]) -> Iterator[None]:
    """The edits in the layers of these indices; the other layers stay plain."""
    if not edits:
        yield
        return
    assert len(sites_of(model, lambda site: site.index in edits)) == len(edits)
    with eagerly(model, by_index(edits), lambda site: site.index in edits):
        yield


def by_index(edits: Mapping[int, Edit]) -> Core:
    """The core that applies each layer's own edit."""
    return lambda site, q, k, v: edits[site.index](q, k, v)


@torch.no_grad()
def run(model: nn.Module, call: dict) -> Tensor:
    return model(**call, return_dict=False)[0]


def run_eagerly(model: nn.Module, call: dict, core: Core, where: Where = everywhere) -> Tensor:
    with eagerly(model, core, where):
        return run(model, call)


def run_layers(model: nn.Module, call: dict) -> tuple[Tensor, list[Tensor]]:
    """(output, what each attention layer returned, in the order of the forward pass; image and text apart)"""
    seen: list[Tensor] = []

    def keep(module: Any, inputs: tuple, output: Any) -> None:
        seen.extend(output if isinstance(output, tuple) else (output,))

    hooks = [site.attn.register_forward_hook(keep) for site in sites_of(model)]
    try:
        return run(model, call), seen
    finally:
        for hook in hooks:
            hook.remove()


# Comparisons


def layer_errors(
    model: nn.Module, call: dict, core: Core, where: Where = everywhere
) -> list[tuple[str, float]]:
    """The error of each layer of the model, with its present processors, against the core on the same input.

    Returns:
        (name, max abs error / max abs value), for image and text apart.
    """
    errors: list[tuple[str, float]] = []

    def compare(site: Site) -> Callable:
        def hook(attn: Any, args: tuple, kwargs: dict, output: Any) -> None:
            expected = EagerProcessor(site, core)(attn, *args, **kwargs)
            mine, theirs = (t if isinstance(t, tuple) else (t,) for t in (output, expected))
            errors.extend(
                (site.name, float((a - b).abs().max() / b.abs().max()))
                for a, b in zip(mine, theirs, strict=True)
            )

        return hook

    sites = sites_of(model, where)
    hooks = [site.attn.register_forward_hook(compare(site), with_kwargs=True) for site in sites]
    try:
        run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    assert {name for name, _ in errors} == {site.name for site in sites}
    return errors


def worst_layer(model: nn.Module, call: dict, core: Core, where: Where = everywhere) -> float:
    return max(error for _, error in layer_errors(model, call, core, where))


def worst_edit(model: nn.Module, call: dict, edits: Mapping[int, Edit]) -> float:
    return worst_layer(model, call, by_index(edits), lambda site: site.index in edits)


def changed_layers(model: nn.Module, call: dict) -> list[str]:
    """The layers of the model, with its present processors, whose output is not plain attention's."""
    return [name for name, error in layer_errors(model, call, plain) if error > 1e-4]


def changed(mine: list[Tensor], plain: list[Tensor]) -> list[int]:
    """Which of the layers' outputs differ; a changed layer changes all later ones."""
    return [
        i
        for i, (a, b) in enumerate(zip(mine, plain, strict=True))
        if float((a - b).abs().max() / b.abs().max()) > 1e-5
    ]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns within the context, without expanded ones."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and 0 not in t.stride():
                self.elements = max(self.elements, t.numel())
        return out


def largest_tensor(model: nn.Module, call: dict) -> int:
    """Elements of the largest tensor in a call of the model."""
    with LargestTensor() as largest:
        run(model, call)
    return largest.elements


# Short runs


def sample_ddim(model: nn.Module, call: dict, steps: int, before: Callable[[int], object] = int) -> Tensor:
    """The latents after a run of DDIM from call["sample"]; `before` is called with the index of each step."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    latents = call["sample"]
    for i, t in enumerate(scheduler.timesteps):
        before(i)
        noise = run(model, call | {"sample": latents, "timestep": t})
        latents = scheduler.step(noise, t, latents).prev_sample  # type: ignore[arg-type, union-attr]
    return latents


def sample_euler(
    model: nn.Module,
    call: dict[str, Tensor],
    latents: Tensor,
    times: Sequence[float],
    before: Callable[[int, Tensor], Tensor] = lambda step, latents: latents,
) -> Iterator[Tensor]:
    """FLUX's latents at each of the times, from the first on; `before` may change them ahead of each step."""
    yield latents
    for step, (now, then) in enumerate(pairwise(times)):
        latents = before(step, latents)
        time = torch.full((latents.shape[0],), now)
        latents = latents + (then - now) * run(model, call | {"hidden_states": latents, "timestep": time})
        yield latents


def descend(step: Callable[[Tensor, int], Tensor], start: Tensor, count: int = 3) -> Tensor:
    """x <- x - step(x, i) / (2 count) for i = 0, 1, ..."""
    x = start
    for i in range(count):
        x = x - step(x, i) / (2 * count)
    return x

"""A FLUX layer from its q, k, v projections to its output projections: norms, joining, RoPE, attention, gain.

The projections are replaced by their results, so that only what lies between them is timed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...bindings import backends
from ..cases.shapes import Shape
from ..cases.truth import compare
from ..timing.paired import paired, ratio
from . import eager
from .forward import Row, Settings, describe, rounded, seconds

EPS = 1e-6  # of FLUX's norms
RATIOS = (("stock", "plain"), ("controlled", "stock"), ("plain", "stock"))


class Given(nn.Module):
    """In place of a projection: its result, whatever comes in."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        return self.result


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the projections of one double block give, its norms' weights, and RoPE's tables."""

    shape: Shape
    image: tuple[Tensor, Tensor, Tensor]  # q, k, v (batch, image tokens, heads * dim)
    text: tuple[Tensor, Tensor, Tensor]  # q, k, v (batch, text tokens, heads * dim)
    norms: tuple[Tensor, Tensor, Tensor, Tensor]  # of the image's q and k, the text's q and k, (dim,)
    rope: tuple[Tensor, Tensor]  # cos, sin (tokens, dim) float32, each pair of neighbours equal

    @staticmethod
    def draw(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        width, text_len = shape.heads * shape.dim, shape.rows["prompt"]

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        def stream(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (normal(shape.batch, tokens, width) for _ in "qkv")
            return q, k, v

        image, text = stream(shape.n_rows - text_len), stream(text_len)
        a, b, c, d = (1 + 0.2 * normal(shape.dim) for _ in range(4))
        rates = 10000.0 ** (-torch.arange(shape.dim // 2, device=device) / (shape.dim // 2))
        angles = (torch.arange(shape.n_rows, device=device)[:, None] * rates).repeat_interleave(2, 1)
        return Inputs(shape, image, text, (a, b, c, d), (angles.cos(), angles.sin()))


def missing() -> list[str]:
    if importlib.util.find_spec("diffusers") is None:
        return ["diffusers is not installed"]
    return backends()["cpu"]


@torch.no_grad()
def measure(shape: Shape, dtype: torch.dtype, settings: Settings) -> Row:
    """The stock processor, uncontrolled, and ours, plain and with In-Context Brush.

    Raises:
        truth.WrongResult: ours is wrong at a small size of the shape.
    """
    row: Row = {"section": "layer", "shape": describe(shape), "dtype": str(dtype).removeprefix("torch.")}
    if reasons := missing():
        return {**row, "seconds": {}, "ratios": {}, "missing": {"layer": "; ".join(reasons)}}
    _check(Inputs.draw(shape.shrunk(), dtype, settings.seed))
    samples = paired(_calls(Inputs.draw(shape, dtype, settings.seed)), settings.repeats, seed=settings.seed)
    ratios = {f"{a}/{b}": ratio(samples, a, b) for a, b in RATIOS}
    return {**row, "seconds": seconds(samples), "ratios": rounded(ratios), "missing": {}}


def _calls(inputs: Inputs) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """By contestant: the layer's (image, text) outputs, (batch, tokens, heads * dim)."""
    from ...integrations.diffusers import FluxControlledAttnProcessor, Plan

    attn = _attention(inputs)
    processors: dict[str, Any] = {
        "plain": FluxControlledAttnProcessor(backend="cpu"),
        "controlled": FluxControlledAttnProcessor(Plan(inputs.shape.control()), backend="cpu"),
    }
    hidden = (inputs.image[0], inputs.text[0])  # not read: the projections are given
    ours = {
        name: functools.partial(processor, attn, *hidden, image_rotary_emb=inputs.rope)
        for name, processor in processors.items()
    }
    return {"stock": stock_processor(inputs), **ours}


def stock_processor(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """diffusers' own processor, uncontrolled: the layer's (image, text) outputs, (batch, tokens, heads *
    dim).
    """
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    hidden = (inputs.image[0], inputs.text[0])  # not read: the projections are given
    processor: Any = FluxAttnProcessor()
    return functools.partial(processor, _attention(inputs), *hidden, image_rotary_emb=inputs.rope)


def _attention(inputs: Inputs) -> nn.Module:
    """A double block's attention whose projections are replaced by their results."""
    from diffusers.models.transformers.transformer_flux import FluxAttention

    shape = inputs.shape
    # The projections' sizes do not matter: they are replaced at once.
    attn = FluxAttention(8, heads=shape.heads, dim_head=shape.dim, added_kv_proj_dim=8, eps=EPS)
    for name, result in zip(("to_q", "to_k", "to_v"), inputs.image, strict=True):
        setattr(attn, name, Given(result))
    for name, result in zip(("add_q_proj", "add_k_proj", "add_v_proj"), inputs.text, strict=True):
        setattr(attn, name, Given(result))
    for name, weight in zip(("norm_q", "norm_k", "norm_added_q", "norm_added_k"), inputs.norms, strict=True):
        getattr(attn, name).weight = nn.Parameter(weight)
    for name, result in (
        ("to_out", nn.ModuleList([nn.Identity(), nn.Identity()])),
        ("to_add_out", nn.Identity()),
    ):
        setattr(attn, name, result)
    return attn


def _check(inputs: Inputs) -> None:
    """Against float64: at most twice the error of the layer's eager form in the dtype, plus an ulp."""
    dtype = inputs.image[0].dtype
    for name, call in _calls(inputs).items():
        controlled = name == "controlled"
        image, text = call()
        exact = _form(inputs, torch.float64, controlled)
        # A gain magnifies the rounding of a mass where heads have nearly the same: in float32 that is chance.
        more = (0.5 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps) * float(exact.abs().max())
        compare(
            f"FLUX layer, {name}, at {inputs.shape.name}, {dtype}",
            torch.cat([text, image], 1),
            exact,
            _form(inputs, dtype, controlled),
            dtype,
            more=more,
        )


def joined(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's q, k and v in `dtype`, (batch, tokens, heads, dim), text first.

    Norms and RoPE compute in float32 at least, and round.
    """
    shape, wide = inputs.shape, torch.promote_types(dtype, torch.float32)
    cos, sin = (t.to(wide)[:, None] for t in inputs.rope)

    def heads(x: Tensor) -> Tensor:
        return x.to(dtype).unflatten(-1, (shape.heads, shape.dim))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        x = heads(x).to(wide)
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.to(wide)).to(dtype)

    def rotate(x: Tensor) -> Tensor:
        real, imaginary = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        return (x.to(wide) * cos + torch.stack([-imaginary, real], -1).flatten(-2) * sin).to(dtype)

    q, k = (
        rotate(
            torch.cat([norm(inputs.text[i], inputs.norms[2 + i]), norm(inputs.image[i], inputs.norms[i])], 1)
        )
        for i in (0, 1)
    )
    return q, k, torch.cat([heads(inputs.text[2]), heads(inputs.image[2])], 1)


def _form(inputs: Inputs, dtype: torch.dtype, controlled: bool) -> Tensor:
    """The layer written out in `dtype`, text first."""
    q, k, v = (t.transpose(1, 2) for t in joined(inputs, dtype))
    if controlled:
        rows = inputs.shape.control().rows
        prompt, subject, target = (rows.slice(n) for n in ("prompt", "subject", "target"))
        out = eager.in_context_brush(q, k, v, prompt, subject, target)
    else:
        out = eager.attention_map(q, k) @ v
    return out.transpose(1, 2).flatten(2)

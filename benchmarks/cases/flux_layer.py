"""A FLUX double block's attention from its q, k, v projections to its output projections.

The projections are replaced by their results, so that norms, joining, RoPE, attention and gain remain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import eager_forms
from .inputs import Sampler
from .shapes import Shape

EPS = 1e-6  # of FLUX's norms
Outputs = tuple[
    Tensor, Tensor
]  # what goes to the output projections: image, text (batch, tokens, heads * dim)
QKV = tuple[Tensor, Tensor, Tensor]


class GivenResult(nn.Module):
    """In place of a projection: returns a fixed result, whatever the input."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def rope_tables(tokens: int, dim: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, dim) float32, each pair of neighbours equal; a token's position is its index."""
    rates = 10000.0 ** (-torch.arange(dim // 2, device=device) / (dim // 2))
    angles = (torch.arange(tokens, device=device)[:, None] * rates).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What the projections of a double block return, the norms' weights, and RoPE's tables.

    Attributes:
        shape: of the attention.
        image: q, k, v, each (batch, tokens, heads * dim).
        text: q, k, v, each (batch, tokens, heads * dim).
        norms: weights (dim,) of the image's q and k and the text's q and k.
        rope: cos and sin, (tokens, dim) float32.
    """

    shape: Shape
    image: QKV
    text: QKV
    norms: tuple[Tensor, Tensor, Tensor, Tensor]
    rope: tuple[Tensor, Tensor]

    @staticmethod
    def draw(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> LayerInputs:
        sampler = Sampler(seed, dtype, device)
        text_len = shape.rows["prompt"]

        def stream(tokens: int) -> QKV:
            q, k, v = (sampler.normal(shape.batch, tokens, shape.heads * shape.dim) for _ in "qkv")
            return q, k, v

        image, text = stream(shape.n_rows - text_len), stream(text_len)
        a, b, c, d = (1 + 0.2 * sampler.normal(shape.dim) for _ in range(4))
        return LayerInputs(shape, image, text, (a, b, c, d), rope_tables(shape.n_rows, shape.dim, device))

    @property
    def hidden_states(self) -> Outputs:
        """Arguments of a processor's call; never read, as the projections are replaced."""
        return self.image[0], self.text[0]


def attention_module(inputs: LayerInputs) -> nn.Module:
    """diffusers' FluxAttention whose projections return `inputs`."""
    from diffusers.models.transformers.transformer_flux import FluxAttention

    shape = inputs.shape
    # The projections' sizes do not matter: they are replaced at once.
    attn = FluxAttention(8, heads=shape.heads, dim_head=shape.dim, added_kv_proj_dim=8, eps=EPS)
    for name, result in zip(("to_q", "to_k", "to_v"), inputs.image, strict=True):
        setattr(attn, name, GivenResult(result))
    for name, result in zip(("add_q_proj", "add_k_proj", "add_v_proj"), inputs.text, strict=True):
        setattr(attn, name, GivenResult(result))
    for name, weight in zip(("norm_q", "norm_k", "norm_added_q", "norm_added_k"), inputs.norms, strict=True):
        getattr(attn, name).weight = nn.Parameter(weight)
    attn.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    attn.to_add_out = nn.Identity()  # type: ignore[assignment]
    return attn


def stock_processor(inputs: LayerInputs) -> Callable[[], Outputs]:
    """A call of diffusers' own processor, without control."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    processor: Any = FluxAttnProcessor()
    call = functools.partial(processor, attention_module(inputs), *inputs.hidden_states)
    return functools.partial(call, image_rotary_emb=inputs.rope)


def joined_qkv(inputs: LayerInputs, dtype: torch.dtype) -> QKV:
    """The layer's q, k and v in `dtype`, (batch, tokens, heads, dim), text first.

    Norms and RoPE compute in float32 at least, and round to `dtype`.
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


def eager_layer(inputs: LayerInputs, dtype: torch.dtype, controlled: bool) -> Tensor:
    """The layer written out in `dtype`, text first: (batch, tokens, heads * dim)."""
    q, k, v = (t.transpose(1, 2) for t in joined_qkv(inputs, dtype))
    if controlled:
        rows = inputs.shape.control().rows
        prompt, subject, target = (rows.slice(n) for n in ("prompt", "subject", "target"))
        out = eager_forms.in_context_brush(q, k, v, prompt, subject, target)
    else:
        out = eager_forms.attend(q, k, v)
    return out.transpose(1, 2).flatten(2)

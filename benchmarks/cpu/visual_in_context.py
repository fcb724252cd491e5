"""A UNet's self-attention with SD-VICL (arXiv 2508.09949), between its projections: SD 1.5's at 64 x 64
latents.

The batch is [A, B, C, D plain, D], as its guidance needs it. Of the five items one reads others and is
contrasted.

`flashbrush bench --sections unet` runs it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cases.truth import compare
from ..timing.paired import paired, ratio
from . import eager
from .forward import Row, Settings, rounded, seconds
from .layer import Given, missing

HEADS, DIM, SIDE, QUICK_SIDE = 8, 40, 64, 16
A, B, C, D, ITEMS = 0, 1, 2, 4, 5
TEMPERATURE, BETA = 0.4, 1.67
CLIPS = {"clipped": (0.0, 1.0), "unclipped": None}
RATIOS = (
    ("eager clipped", "clipped"),
    ("eager unclipped", "unclipped"),
    ("sdpa and eager clipped", "clipped"),
    ("sdpa and eager unclipped", "unclipped"),
    ("stock", "plain"),
    ("clipped", "plain"),
    ("unclipped", "plain"),
)
QKV = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def measure(side: int, dtype: torch.dtype, settings: Settings) -> Row:
    """Ours, plain and controlled; diffusers' processor, uncontrolled; and two ways to control without a
    kernel for it.

    "eager" holds the whole batch's attention map, as the released code of cross-image attention does; "sdpa
    and eager" only D's, and leaves the other items to torch's SDPA. Neither is charged for a change of
    layout.

    Raises:
        truth.WrongResult: a result is wrong at a small size.
    """
    row: Row = {
        "section": "unet",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"size": f"({ITEMS},{HEADS},{side**2},{DIM})", "rows": side**2, "heads": HEADS, "dim": DIM},
    }
    if reasons := missing():
        return {**row, "seconds": {}, "ratios": {}, "missing": {"unet": "; ".join(reasons)}}
    _check(draw(8, dtype, settings.seed))
    samples = paired(_calls(draw(side, dtype, settings.seed)), settings.repeats, seed=settings.seed)
    ratios = {f"{a}/{b}": ratio(samples, a, b) for a, b in RATIOS}
    return {**row, "seconds": seconds(samples), "ratios": rounded(ratios), "missing": {}}


def draw(side: int, dtype: torch.dtype, seed: int) -> QKV:
    """What the projections give, (5, side * side, 8 * 40)."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(ITEMS, side**2, HEADS * DIM, generator=generator).to(dtype) for _ in "qkv")
    return q, k, v


def _calls(qkv: QKV) -> dict[str, Callable[[], Tensor]]:
    """By contestant: the layer's output, (5, tokens, 8 * 40), of the eager forms (5, 8, tokens, 40)."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    from ...integrations.diffusers import Layer, Step, UNetControlledAttnProcessor
    from ...integrations.methods import InContextRoles, VisualInContext

    attn, tokens = _attention(qkv), qkv[0].shape[1]
    side = math.isqrt(tokens)
    where = Layer(13, "self", "up", HEADS, DIM, 0, tokens, ITEMS, (side, side))
    processors: dict[str, Any] = {
        "stock": AttnProcessor2_0(),
        "plain": UNetControlledAttnProcessor(backend="cpu"),
    }
    for name, clip in CLIPS.items():
        method = VisualInContext(TEMPERATURE, BETA, clip, items=InContextRoles.stacked())
        processors[name] = UNetControlledAttnProcessor(method.plan(where, Step(0)), backend="cpu")
    calls: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(processor, attn, qkv[0]) for name, processor in processors.items()
    }
    heads = _heads(qkv)
    for name, clip in CLIPS.items():
        calls[f"eager {name}"] = functools.partial(_eager, heads, clip, eager.attend)
        calls[f"sdpa and eager {name}"] = functools.partial(
            _eager, heads, clip, F.scaled_dot_product_attention
        )
    return calls


def _attention(qkv: QKV) -> nn.Module:
    """A self-attention whose projections are replaced by their results."""
    from diffusers.models.attention_processor import Attention

    attn = Attention(8, heads=HEADS, dim_head=DIM)  # the projections' sizes do not matter
    for name, result in zip(("to_q", "to_k", "to_v"), qkv, strict=True):
        setattr(attn, name, Given(result))
    attn.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    return attn


def _heads(qkv: QKV, dtype: torch.dtype | None = None) -> QKV:
    """(5, 8, tokens, 40), contiguous"""
    q, k, v = (t.to(dtype or t.dtype).unflatten(-1, (HEADS, DIM)).transpose(1, 2).contiguous() for t in qkv)
    return q, k, v


def _eager(
    heads: QKV, clip: tuple[float, float] | None, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    q, k, v = heads
    others = attend(q[:D], k[:D], v[:D])
    mine = eager.contrast(q[[C]], k[[A]], v[[B]], BETA, clip, TEMPERATURE)
    return torch.cat([others, mine])


def _check(qkv: QKV) -> None:
    """Against float64: at most twice the error of the eager form in the dtype, plus an ulp."""
    dtype = qkv[0].dtype
    for name, call in _calls(qkv).items():
        controlled, clip = name.split()[-1] in CLIPS, CLIPS.get(name.split()[-1])
        exact, form = (
            _eager(heads, clip, eager.attend) if controlled else eager.attend(*heads)
            for heads in (_heads(qkv, torch.float64), _heads(qkv))
        )
        out = call()
        if out.dim() == 3:
            out = out.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        more = torch.finfo(dtype).eps * float(exact.abs().max())
        compare(f"UNet layer, {name}, {dtype}", out, exact, form, dtype, more=more)

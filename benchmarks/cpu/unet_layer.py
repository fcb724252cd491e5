"""SD 1.5's self-attention at 64 x 64 latents with SD-VICL (arXiv 2508.09949), between its projections.

The batch is [A, B, C, D plain, D], as the swap guidance needs it. Only the last item reads others: queries of
C, keys of A, values of B, temperature 0.4, contrast 1.67.

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

from ..cases import eager_forms
from ..cases.contestants import missing_for_layers
from ..cases.float64_check import compare
from ..cases.flux_layer import QKV, GivenResult
from ..cases.inputs import Sampler
from ..timing.host_clock import time_on_host
from ..timing.rounds import ratio
from ..timing.rows import Row, Settings, dtype_name, ratio_cells, seconds_cells, untimed

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
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def measure(side: int, dtype: torch.dtype, settings: Settings) -> Row:
    """Ours, plain and controlled; diffusers' processor, uncontrolled; two eager controlled forms.

    "eager" holds the map of the whole batch, as the released code of cross-image attention does; "sdpa and
    eager" holds D's map alone and leaves the other items to torch SDPA. Neither is charged for a change of
    layout.

    Raises:
        WrongResult: a result is wrong at a small size.
    """
    row: Row = {
        "section": "unet",
        "dtype": dtype_name(dtype),
        "shape": {"size": f"({ITEMS},{HEADS},{side**2},{DIM})", "rows": side**2, "heads": HEADS, "dim": DIM},
    }
    if reasons := missing_for_layers():
        return untimed(row, "unet", reasons)
    _check(_draw(8, dtype, settings.seed))
    samples = time_on_host(_calls(_draw(side, dtype, settings.seed)), settings.repeats, seed=settings.seed)
    ratios = {f"{a}/{b}": ratio(samples, a, b) for a, b in RATIOS}
    return {**row, "seconds": seconds_cells(samples), "ratios": ratio_cells(ratios), "missing": {}}


def _draw(side: int, dtype: torch.dtype, seed: int) -> QKV:
    """Results of the projections, each (5, side * side, 8 * 40)."""
    sampler = Sampler(seed, dtype)
    q, k, v = (sampler.normal(ITEMS, side**2, HEADS * DIM) for _ in "qkv")
    return q, k, v


def _calls(qkv: QKV) -> dict[str, Callable[[], Tensor]]:
    """The layer's call by contestant: -> (5, tokens, 8 * 40), of the eager forms (5, 8, tokens, 40)."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    from ...integrations.diffusers import Layer, Step, UNetControlledAttnProcessor
    from ...integrations.methods import InContextRoles, VisualInContext

    attn, tokens = _attention_module(qkv), qkv[0].shape[1]
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
    heads = _heads_first(qkv)
    for name, clip in CLIPS.items():
        calls[f"eager {name}"] = functools.partial(_eager, heads, clip, eager_forms.attend)
        calls[f"sdpa and eager {name}"] = functools.partial(
            _eager, heads, clip, F.scaled_dot_product_attention
        )
    return calls


def _attention_module(qkv: QKV) -> nn.Module:
    """diffusers' Attention whose projections return q, k and v."""
    from diffusers.models.attention_processor import Attention

    attn = Attention(8, heads=HEADS, dim_head=DIM)  # the projections' sizes do not matter
    for name, result in zip(("to_q", "to_k", "to_v"), qkv, strict=True):
        setattr(attn, name, GivenResult(result))
    attn.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    return attn


def _heads_first(qkv: QKV, dtype: torch.dtype | None = None) -> QKV:
    """(5, 8, tokens, 40), contiguous."""
    q, k, v = (t.to(dtype or t.dtype).unflatten(-1, (HEADS, DIM)).transpose(1, 2).contiguous() for t in qkv)
    return q, k, v


def _eager(heads: QKV, clip: tuple[float, float] | None, attend: Attend) -> Tensor:
    """(5, 8, tokens, 40): the first four items by `attend`, D by the eager form."""
    q, k, v = heads
    others = attend(q[:D], k[:D], v[:D])
    mine = eager_forms.contrast(q[[C]], k[[A]], v[[B]], BETA, clip, TEMPERATURE)
    return torch.cat([others, mine])


def _check(qkv: QKV) -> None:
    """Every contestant against float64: at most twice the eager form's error in the dtype, plus an ulp."""
    dtype = qkv[0].dtype
    for name, call in _calls(qkv).items():
        kind = name.split()[-1]
        exact, eager = (
            _eager(heads, CLIPS[kind], eager_forms.attend) if kind in CLIPS else eager_forms.attend(*heads)
            for heads in (_heads_first(qkv, torch.float64), _heads_first(qkv))
        )
        out = call()
        if out.dim() == 3:
            out = out.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        more = torch.finfo(dtype).eps * float(exact.abs().max())
        compare(f"UNet layer, {name}, {dtype}", out, exact, eager, dtype, more=more)

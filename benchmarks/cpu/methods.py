"""Published methods in one attention layer, between its projections, beside the eager forms of their papers'
code.

At SD 1.5's and FLUX's real shapes, where the map is what costs. The batch is as the method's guidance needs
it.

`flashbrush bench --sections methods` runs it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases.truth import compare
from ..timing.paired import paired, ratio
from . import eager
from .forward import Row, Settings, rounded, seconds
from .layer import Given, missing

SIDE, QUICK_SIDE = 64, 16  # latents of SD 1.5
TOKENS, QUICK_TOKENS = 1024, 64  # FLUX's image tokens, of 512 x 512 pixels
TEXT = 77
Eager = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (batch, heads, tokens, dim) -> such a tensor


@dataclass(frozen=True)
class Case:
    """A method in a layer."""

    layer: Any  # Layer
    plan: Any  # Plan
    eager: Eager
    keys: int  # tokens that q, k and v have keys of
    other: Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]] | None = (
        None  # diffusers' own, of (batch, tokens, ...)
    )


def measure(side: int, tokens: int, dtype: torch.dtype, settings: Settings) -> Row:
    """Ours and the eager form of every method, each pair in the same rounds.

    Raises:
        truth.WrongResult: a result is wrong at a small size.
    """
    row: Row = {
        "section": "methods",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"size": f"SD 1.5 at {side}x{side}, FLUX with {tokens} image tokens"},
    }
    if reasons := missing():
        return {**row, "seconds": {}, "ratios": {}, "missing": {"methods": "; ".join(reasons)}}
    times, ratios = {}, {}
    with torch.no_grad():
        for name, case in cases(8, 24, dtype, settings.seed):
            _check(name, case, dtype, settings.seed)
        for name, case in cases(side, tokens, dtype, settings.seed):
            samples = paired(_calls(name, case, dtype, settings.seed), settings.repeats, seed=settings.seed)
            times |= seconds(samples)
            ratios |= {f"{other}/{name}": ratio(samples, other, name) for other in samples if other != name}
    return {**row, "seconds": times, "ratios": rounded(ratios), "missing": {}}


def cases(side: int, tokens: int, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Case]]:
    """SD 1.5's layers of side x side tokens, 8 heads of 40; FLUX's, 24 heads of 128, with 512 of text."""
    from ...integrations import methods as m
    from ...integrations.diffusers import Layer, Step

    generator = torch.Generator().manual_seed(seed)
    n, step = side * side, Step(5, 50)
    own = Layer(20, "self", "up", 8, 40, 0, n, 4, (side, side))  # of the eleventh transformer block
    three = Layer(20, "self", "up", 8, 40, 0, n, 3, (side, side))
    source, target = torch.arange(side)[None] < side // 3, torch.arange(side)[:, None] < side // 2
    masks = source.expand(side, side), target.expand(side, side)

    yield "plug_and_play", Case(own, m.PlugAndPlay(feature=None).plan(own, step), _injected, n)
    yield "masa_ctrl", Case(own, m.MasaCtrl().plan(own, step), _mutual, n)
    masked = m.MasaCtrl(masks=masks).plan(own, step)
    yield (
        "masa_ctrl, masked",
        Case(own, masked, functools.partial(_masked, [mask.flatten() for mask in masks]), n),
    )
    pag = m.PerturbedAttention(items=(2,), layers=["up"])
    yield "pag", Case(three, pag.plan(three, step), _identity, n)
    for sigma in (10.0, torch.inf):
        blur = m.SmoothedEnergy(items=(2,), layers=["up"], sigma=sigma)
        yield (
            f"seg, sigma {sigma:g}",
            Case(three, blur.plan(three, step), functools.partial(_blurred, side, sigma), n),
        )

    cross = Layer(21, "cross", "up", 8, 40, TEXT, n, 2, (side, side))
    regions = torch.stack([mask.float() for mask in masks])
    spans = ((5, 9), (20, 24))
    words = m.RegionalPrompting(regions, spans, form="groups")
    yield (
        "regional_prompting",
        Case(cross, words.plan(cross, step), functools.partial(_regions, regions, spans), TEXT),
    )
    yield "ip_adapter, two", _adapters(cross, regions, dtype, generator)

    whole_image = Layer(0, "double", None, 24, 128, 512, tokens, 1)
    omini = m.OminiControl(tokens // 2, strength=0.5)
    rows = 512 + tokens - tokens // 2
    yield (
        "omini_control",
        Case(
            whole_image, omini.plan(whole_image, step), functools.partial(_weighed, rows, 0.5), 512 + tokens
        ),
    )

    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    parameters = m.ICCustomParameters(24 * 128).to(dtype)
    for p in parameters.parameters():
        p.requires_grad_(False).copy_(torch.randn(p.shape, generator=generator))
    custom = m.ICCustom(parameters, grid=(height, tokens // height))
    registers = [t.unflatten(1, (24, 128))[None].transpose(1, 2) for t in parameters.registers("free")]
    joined = functools.partial(_before_a_background, registers, 0.0)
    yield "ic_custom", Case(whole_image, custom.plan(whole_image, step), joined, 512 + tokens)

    text = 333
    sd3 = Layer(0, "joint", None, 24, 64, text, tokens, 1, None)
    references = [torch.randn(1, 2 * tokens, 24, 64, generator=generator).to(dtype) for _ in "kv"]
    shift = m.CustomShift(items=(0,))
    shift._kept[0] = references[0], references[1]
    joined = functools.partial(_before_a_background, [t.transpose(1, 2) for t in references], 0.0)
    yield "custom_shift, two references", Case(sd3, shift.plan(sd3, step), joined, text + tokens)

    masked_tokens = tokens // 4
    joint = Layer(0, "double", None, 24, 128, 512, masked_tokens, 1)
    kept = tokens - masked_tokens
    k, v = (torch.randn(1, kept, 24, 128, generator=generator).to(dtype) for _ in "kv")
    edit = m.KVEdit(torch.arange(tokens) < masked_tokens, (1.0, 0.5, 0.0), "edit")
    # What an inversion has left: the background first, as the method keeps it.
    whole = [torch.cat([t, torch.zeros(1, masked_tokens, 24, 128, dtype=dtype)], 1) for t in (k, v)]
    edit.kept[1.0, 0] = whole[0], whole[1], dtype
    background = [t.transpose(1, 2) for t in (k, v)]
    kv_edit = functools.partial(_before_a_background, background, 1.0)
    yield "kv_edit", Case(joint, edit.plan(joint, Step(0)), kv_edit, 512 + masked_tokens)


def _injected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eager.attend(q[[0, 0, 2, 2]], k[[0, 0, 2, 2]], v)


def _mutual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eager.attend(q, k[[0, 0, 2, 2]], v[[0, 0, 2, 2]])


def _masked(masks: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The source's own attention, and two maps of the edit's, one for the keys in the mask, one for the
    others.
    """
    out = eager.attend(q, k[[0, 0, 2, 2]], v[[0, 0, 2, 2]])
    keys, rows = masks
    scores = q[[1, 3]] @ k[[0, 2]].mT * q.shape[-1] ** -0.5
    inside, outside = (
        torch.softmax(scores.masked_fill(~m, -torch.inf), -1) @ v[[0, 2]] for m in (keys, ~keys)
    )
    gate = rows.to(q.dtype)[:, None]
    out[[1, 3]] = gate * inside + (1 - gate) * outside
    return out


def _identity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([eager.attend(q[:2], k[:2], v[:2]), v[2:]])


def _blurred(side: int, sigma: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The released code's: a convolution of the queries as an image."""
    image = q[2:].unflatten(2, (side, side)).permute(0, 1, 4, 2, 3).flatten(0, 2)[:, None]
    if sigma == torch.inf:
        image = image.mean((2, 3), keepdim=True).expand_as(image)
    else:
        reach = min(-(-int(6 * sigma) // 2), (side - 1) // 2)
        taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
        taps = (taps / taps.sum()).to(q.dtype)
        image = F.conv2d(F.pad(image, (reach,) * 4, mode="reflect"), (taps[:, None] * taps)[None, None])
    blurred = image.reshape(1, q.shape[1], q.shape[3], side * side).transpose(2, 3)
    return eager.attend(torch.cat([q[:2], blurred]), k, v)


def _regions(masks: Tensor, spans: tuple, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    share = masks.flatten(1) / masks.flatten(1).sum(0).clamp(min=1)
    rest = [j for j in range(k.shape[2]) if not any(a <= j < b for a, b in spans)]
    out = (1 - share.sum(0))[:, None].to(q.dtype) * eager.attend(q, k[:, :, rest], v[:, :, rest])
    for one, (a, b) in zip(share, spans, strict=True):
        out = out + one[:, None].to(q.dtype) * eager.attend(q, k[:, :, a:b], v[:, :, a:b])
    return out


def _before_a_background(background: list[Tensor], scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    own, (more_k, more_v) = k.shape[2], (t.to(q.dtype) for t in background)
    bias = torch.zeros(own + more_k.shape[2], dtype=q.dtype)
    bias[own:] = scale
    k, v = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, -1) @ v


def _weighed(others: int, strength: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """OminiControl's first release: a bias for every pair of tokens."""
    bias = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
    bias[:others, others:] = bias[others:, :others] = torch.tensor(strength).log()
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, -1) @ v


def _adapters(layer: Any, regions: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Case:
    """Two adapters of 4 tokens with a mask each; diffusers' processor for them too."""
    from ...integrations import methods as m
    from ...integrations.diffusers import Step

    channels, name = 768, "up_blocks.3.attentions.0.transformer_blocks.0.attn2"
    tokens = [torch.randn(layer.batch, 1, 4, channels, generator=generator).to(dtype) for _ in range(2)]
    weights = [
        [(torch.randn(320, channels, generator=generator) * channels**-0.5).to(dtype) for _ in "kv"]
        for _ in range(2)
    ]
    masks = [region[None, None].to(dtype) for region in regions]
    prompts = [m.ImagePrompt({name: tuple(w)}, tokens=t) for w, t in zip(weights, tokens, strict=True)]
    method = m.IPAdapter(prompts, 0.7, masks)
    method._names = [name] * (layer.index + 1)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = eager.attend(q, k, v)
        for w, t, mask in zip(weights, tokens, masks, strict=True):
            ik, iv = (
                F.linear(t[:, 0].to(q.dtype), x.to(q.dtype)).unflatten(-1, (8, 40)).transpose(1, 2) for x in w
            )
            out = out + 0.7 * mask.flatten()[:, None].to(q.dtype) * eager.attend(q, ik, iv)
        return out

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

        attn = Attention(320, cross_attention_dim=channels, heads=8, dim_head=40)
        kind: Any = IPAdapterAttnProcessor2_0  # annotated as taking one scale
        processor = kind(320, channels, num_tokens=(4, 4), scale=[0.7, 0.7]).to(dtype)
        for i, pair in enumerate(weights):
            processor.to_k_ip[i].weight, processor.to_v_ip[i].weight = (torch.nn.Parameter(w) for w in pair)
        for which, t in (("to_q", q), ("to_k", k), ("to_v", v)):
            setattr(attn, which, Given(t.flatten(2)))
        attn.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        text = k.flatten(2)
        return lambda: processor(attn, q.flatten(2), (text, tokens), ip_adapter_masks=masks)

    return Case(layer, method.plan(layer, Step(0)), plain, TEXT, stock)


def draw(case: Case, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the projections give them, (batch, tokens, heads, dim)."""
    generator, layer = torch.Generator().manual_seed(seed), case.layer
    q, k, v = (
        torch.randn(layer.batch, n, layer.heads, layer.head_dim, generator=generator).to(dtype)
        for n in (layer.rows, case.keys, case.keys)
    )
    return q, k, v


def _calls(name: str, case: Case, dtype: torch.dtype, seed: int) -> dict[str, Callable[[], Tensor]]:
    from ...integrations.diffusers.protocol.plan_call import PlanCall

    q, k, v = draw(case, dtype, seed)
    layer, call = case.layer, PlanCall(case.plan, backend="cpu")
    case.plan.check(layer)
    heads = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda: call.attend(q, k, v, cross=layer.kind == "cross"),
        f"eager {name}": functools.partial(case.eager, *heads),
    }
    if case.other is not None:
        calls[f"diffusers {name}"] = case.other(q, k, v)
    return calls


def _check(name: str, case: Case, dtype: torch.dtype, seed: int) -> None:
    """Against float64: at most twice the error of the eager form in the dtype, plus an ulp."""
    q, k, v = (t.transpose(1, 2) for t in draw(case, dtype, seed))
    exact, form = case.eager(q.double(), k.double(), v.double()), case.eager(q, k, v)
    for who, call in _calls(name, case, dtype, seed).items():
        if who.startswith("eager"):
            continue
        out = call()
        if out.dim() == 3:
            out = out.unflatten(-1, (case.layer.heads, -1))
        more = torch.finfo(dtype).eps * float(exact.abs().max())
        compare(f"{who}, {dtype}", out.transpose(1, 2), exact, form, dtype, more=more)

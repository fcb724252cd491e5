"""Published methods in one attention layer, between its projections, beside the eager forms of their code.

Shapes are SD 1.5's and FLUX's own, and the batch is as the method's guidance needs it.

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

from ..cases import eager_forms
from ..cases.contestants import missing_for_layers
from ..cases.float64_check import compare
from ..cases.flux_layer import GivenResult
from ..cases.inputs import Sampler
from ..timing.host_clock import time_on_host
from ..timing.rounds import ratio
from ..timing.rows import Row, Settings, dtype_name, ratio_cells, seconds_cells, untimed

SIDE, QUICK_SIDE = 64, 16  # latents of SD 1.5
TOKENS, QUICK_TOKENS = 1024, 64  # FLUX's image tokens, of 512 x 512 pixels
TEXT = 77
Eager = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (batch, heads, tokens, dim) -> such a tensor


@dataclass(frozen=True)
class MethodCase:
    """A method in a layer.

    Attributes:
        layer: the Layer that it plans for.
        plan: its Plan.
        eager: its form with the map in memory.
        keys: tokens of k and v.
        other: another implementation's call, made from q, k and v (batch, tokens, heads, dim); None: there is
            none.
    """

    layer: Any
    plan: Any
    eager: Eager
    keys: int
    other: Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]] | None = None


def measure(side: int, tokens: int, dtype: torch.dtype, settings: Settings) -> Row:
    """Ours and the eager form of every method, each pair in the same rounds.

    Raises:
        WrongResult: a result is wrong at a small size.
    """
    row: Row = {
        "section": "methods",
        "dtype": dtype_name(dtype),
        "shape": {"size": f"SD 1.5 at {side}x{side}, FLUX with {tokens} image tokens"},
    }
    if reasons := missing_for_layers():
        return untimed(row, "methods", reasons)
    times, ratios = {}, {}
    with torch.no_grad():
        for name, case in cases(8, 24, dtype, settings.seed):
            _check(name, case, dtype, settings.seed)
        for name, case in cases(side, tokens, dtype, settings.seed):
            calls = _calls(name, case, dtype, settings.seed)
            samples = time_on_host(calls, settings.repeats, seed=settings.seed)
            times |= seconds_cells(samples)
            ratios |= {f"{other}/{name}": ratio(samples, other, name) for other in samples if other != name}
    return {**row, "seconds": times, "ratios": ratio_cells(ratios), "missing": {}}


def cases(side: int, tokens: int, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, MethodCase]]:
    """SD 1.5's layers of side x side tokens, 8 heads of 40; FLUX's, 24 heads of 128, with 512 of text."""
    from ...integrations import methods as m
    from ...integrations.diffusers import Layer, Step

    sampler = Sampler(seed, dtype)
    n, step = side * side, Step(5, 50)
    own = Layer(20, "self", "up", 8, 40, 0, n, 4, (side, side))  # in the eleventh transformer block
    three = Layer(20, "self", "up", 8, 40, 0, n, 3, (side, side))
    source, target = torch.arange(side)[None] < side // 3, torch.arange(side)[:, None] < side // 2
    masks = source.expand(side, side), target.expand(side, side)

    yield "plug_and_play", MethodCase(own, m.PlugAndPlay(feature=None).plan(own, step), _injected, n)
    yield "masa_ctrl", MethodCase(own, m.MasaCtrl().plan(own, step), _mutual, n)
    masked = m.MasaCtrl(masks=masks).plan(own, step)
    yield (
        "masa_ctrl, masked",
        MethodCase(own, masked, functools.partial(_masked, [mask.flatten() for mask in masks]), n),
    )
    pag = m.PerturbedAttention(items=(2,), layers=["up"])
    yield "pag", MethodCase(three, pag.plan(three, step), _own_values, n)
    for sigma in (10.0, torch.inf):
        blur = m.SmoothedEnergy(items=(2,), layers=["up"], sigma=sigma)
        yield (
            f"seg, sigma {sigma:g}",
            MethodCase(three, blur.plan(three, step), functools.partial(_blurred, side, sigma), n),
        )

    cross = Layer(21, "cross", "up", 8, 40, TEXT, n, 2, (side, side))
    regions = torch.stack([mask.float() for mask in masks])
    spans = ((5, 9), (20, 24))
    words = m.RegionalPrompting(regions, spans, form="groups")
    yield (
        "regional_prompting",
        MethodCase(cross, words.plan(cross, step), functools.partial(_regions, regions, spans), TEXT),
    )
    yield "ip_adapter, two", _two_adapters(cross, regions, sampler)

    whole_image = Layer(0, "double", None, 24, 128, 512, tokens, 1)
    omini = m.OminiControl(tokens // 2, strength=0.5)
    rows = 512 + tokens - tokens // 2
    yield (
        "omini_control",
        MethodCase(
            whole_image, omini.plan(whole_image, step), functools.partial(_pair_bias, rows, 0.5), 512 + tokens
        ),
    )

    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    parameters = m.ICCustomParameters(24 * 128).to(dtype)
    for p in parameters.parameters():
        p.requires_grad_(False).copy_(sampler.float32(*p.shape))
    custom = m.ICCustom(parameters, grid=(height, tokens // height))
    registers = [t.unflatten(1, (24, 128))[None].transpose(1, 2) for t in parameters.registers("free")]
    joined = functools.partial(_with_more_keys, registers, 0.0)
    yield "ic_custom", MethodCase(whole_image, custom.plan(whole_image, step), joined, 512 + tokens)

    text = 333
    sd3 = Layer(0, "joint", None, 24, 64, text, tokens, 1, None)
    references = [sampler.normal(1, 2 * tokens, 24, 64) for _ in "kv"]
    shift = m.CustomShift(items=(0,))
    shift._kept[0] = references[0], references[1]
    joined = functools.partial(_with_more_keys, [t.transpose(1, 2) for t in references], 0.0)
    yield "custom_shift, two references", MethodCase(sd3, shift.plan(sd3, step), joined, text + tokens)

    masked_tokens = tokens // 4
    joint = Layer(0, "double", None, 24, 128, 512, masked_tokens, 1)
    kept = tokens - masked_tokens
    k, v = (sampler.normal(1, kept, 24, 128) for _ in "kv")
    edit = m.KVEdit(torch.arange(tokens) < masked_tokens, (1.0, 0.5, 0.0), "edit")
    # As an inversion leaves them: the background's keys and values first.
    whole = [torch.cat([t, torch.zeros(1, masked_tokens, 24, 128, dtype=dtype)], 1) for t in (k, v)]
    edit.kept[1.0, 0] = whole[0], whole[1], dtype
    background = [t.transpose(1, 2) for t in (k, v)]
    kv_edit = functools.partial(_with_more_keys, background, 1.0)
    yield "kv_edit", MethodCase(joint, edit.plan(joint, Step(0)), kv_edit, 512 + masked_tokens)


def _injected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plug-and-Play: the edit's items read with the source's queries and keys."""
    return eager_forms.attend(q[[0, 0, 2, 2]], k[[0, 0, 2, 2]], v)


def _mutual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MasaCtrl: the edit's items read the source's keys and values."""
    return eager_forms.attend(q, k[[0, 0, 2, 2]], v[[0, 0, 2, 2]])


def _masked(masks: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MasaCtrl with masks: the edit's rows read the source's masked keys, or its other keys."""
    out = eager_forms.attend(q, k[[0, 0, 2, 2]], v[[0, 0, 2, 2]])
    keys, rows = masks
    scores = q[[1, 3]] @ k[[0, 2]].mT * q.shape[-1] ** -0.5
    inside, outside = (
        torch.softmax(scores.masked_fill(~m, -torch.inf), -1) @ v[[0, 2]] for m in (keys, ~keys)
    )
    gate = rows.to(q.dtype)[:, None]
    out[[1, 3]] = gate * inside + (1 - gate) * outside
    return out


def _own_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Perturbed-attention guidance: an identity map in the last item."""
    return torch.cat([eager_forms.attend(q[:2], k[:2], v[:2]), v[2:]])


def _blurred(side: int, sigma: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Smoothed energy guidance as released: the last item's queries are blurred as an image."""
    image = q[2:].unflatten(2, (side, side)).permute(0, 1, 4, 2, 3).flatten(0, 2)[:, None]
    if sigma == torch.inf:
        image = image.mean((2, 3), keepdim=True).expand_as(image)
    else:
        reach = min(-(-int(6 * sigma) // 2), (side - 1) // 2)
        taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
        taps = (taps / taps.sum()).to(q.dtype)
        image = F.conv2d(F.pad(image, (reach,) * 4, mode="reflect"), (taps[:, None] * taps)[None, None])
    blurred = image.reshape(1, q.shape[1], q.shape[3], side * side).transpose(2, 3)
    return eager_forms.attend(torch.cat([q[:2], blurred]), k, v)


def _regions(masks: Tensor, spans: tuple, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Regional prompting: a softmax per region's words and one over the rest, mixed by the masks."""
    share = masks.flatten(1) / masks.flatten(1).sum(0).clamp(min=1)
    rest = [j for j in range(k.shape[2]) if not any(a <= j < b for a, b in spans)]
    out = (1 - share.sum(0))[:, None].to(q.dtype) * eager_forms.attend(q, k[:, :, rest], v[:, :, rest])
    for one, (a, b) in zip(share, spans, strict=True):
        out = out + one[:, None].to(q.dtype) * eager_forms.attend(q, k[:, :, a:b], v[:, :, a:b])
    return out


def _with_more_keys(more: list[Tensor], bias: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Further keys and values behind the layer's own, with a bias on their logits."""
    own, (more_k, more_v) = k.shape[2], (t.to(q.dtype) for t in more)
    biases = torch.zeros(own + more_k.shape[2], dtype=q.dtype)
    biases[own:] = bias
    k, v = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + biases, -1) @ v


def _pair_bias(others: int, strength: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """OminiControl's first release: a bias of log(strength) on pairs of condition and other tokens."""
    bias = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
    bias[:others, others:] = bias[others:, :others] = torch.tensor(strength).log()
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, -1) @ v


def _two_adapters(layer: Any, regions: Tensor, sampler: Sampler) -> MethodCase:
    """Two IP-Adapters of 4 tokens with a mask each, also by diffusers' own processor."""
    from ...integrations import methods as m
    from ...integrations.diffusers import Step

    channels, name = 768, "up_blocks.3.attentions.0.transformer_blocks.0.attn2"
    tokens = [sampler.normal(layer.batch, 1, 4, channels) for _ in range(2)]
    weights = [
        [(sampler.float32(320, channels) * channels**-0.5).to(sampler.dtype) for _ in "kv"] for _ in range(2)
    ]
    masks = [region[None, None].to(sampler.dtype) for region in regions]
    prompts = [m.ImagePrompt({name: tuple(w)}, tokens=t) for w, t in zip(weights, tokens, strict=True)]
    method = m.IPAdapter(prompts, 0.7, masks)
    method._names = [name] * (layer.index + 1)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = eager_forms.attend(q, k, v)
        for w, t, mask in zip(weights, tokens, masks, strict=True):
            ik, iv = (
                F.linear(t[:, 0].to(q.dtype), x.to(q.dtype)).unflatten(-1, (8, 40)).transpose(1, 2) for x in w
            )
            out = out + 0.7 * mask.flatten()[:, None].to(q.dtype) * eager_forms.attend(q, ik, iv)
        return out

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

        attn = Attention(320, cross_attention_dim=channels, heads=8, dim_head=40)
        kind: Any = IPAdapterAttnProcessor2_0  # annotated as taking one scale
        processor = kind(320, channels, num_tokens=(4, 4), scale=[0.7, 0.7]).to(sampler.dtype)
        for i, pair in enumerate(weights):
            processor.to_k_ip[i].weight, processor.to_v_ip[i].weight = (torch.nn.Parameter(w) for w in pair)
        for which, t in (("to_q", q), ("to_k", k), ("to_v", v)):
            setattr(attn, which, GivenResult(t.flatten(2)))
        attn.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        text = k.flatten(2)
        return lambda: processor(attn, q.flatten(2), (text, tokens), ip_adapter_masks=masks)

    return MethodCase(layer, method.plan(layer, Step(0)), plain, TEXT, stock)


def _draw(case: MethodCase, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Results of the projections: q, k and v (batch, tokens, heads, dim)."""
    sampler, layer = Sampler(seed, dtype), case.layer
    q, k, v = (
        sampler.normal(layer.batch, n, layer.heads, layer.head_dim)
        for n in (layer.rows, case.keys, case.keys)
    )
    return q, k, v


def _calls(name: str, case: MethodCase, dtype: torch.dtype, seed: int) -> dict[str, Callable[[], Tensor]]:
    from ...integrations.diffusers.protocol.plan_call import PlanCall

    q, k, v = _draw(case, dtype, seed)
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


def _check(name: str, case: MethodCase, dtype: torch.dtype, seed: int) -> None:
    """Against the eager form in float64: at most twice the eager form's error in the dtype, plus an ulp."""
    q, k, v = (t.transpose(1, 2) for t in _draw(case, dtype, seed))
    exact, eager = case.eager(q.double(), k.double(), v.double()), case.eager(q, k, v)
    for who, call in _calls(name, case, dtype, seed).items():
        if who.startswith("eager"):
            continue
        out = call()
        if out.dim() == 3:
            out = out.unflatten(-1, (case.layer.heads, -1))
        more = torch.finfo(dtype).eps * float(exact.abs().max())
        compare(f"{who}, {dtype}", out.transpose(1, 2), exact, eager, dtype, more=more)

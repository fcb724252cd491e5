"""The operators around attention on a GPU: checked against torch's in float64, then timed beside those."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bindings import adain, attention, blend_latents, column_mass, qk_norm_rope, query_blur
from ..cases.float64_check import WrongResult, compare
from ..cases.flux_layer import EPS, rope_tables
from ..cases.inputs import Sampler
from ..timing.device_clock import input_sets, time_on_device, time_replays
from ..timing.rounds import ratio, spread
from ..timing.rows import Row, dtype_name, ratio_cells, seconds_cells
from .setup import Setup, judged

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: in the results.
        draw: makes its inputs.
        ours: takes the inputs.
        form: the same by torch's operators, in the inputs' dtype or in float64.
        work: what a rate in bytes of inputs and output does not count.
        magnified: allowed on top of twice the form's error, in float32 eps of the largest value.
    """

    name: str
    draw: Callable[[Setup, Sampler], Inputs]
    ours: Callable[..., Tensor]
    form: Callable[..., Tensor]
    work: str
    magnified: float = 0.0


def _streams(setup: Setup, sampler: Sampler) -> Inputs:
    """FLUX's q: 512 text tokens and two panels; the norms' weights; RoPE's tables."""
    text, image, heads, dim = (5, 24, 2, 16) if setup.dry else (512, 4608, 24, 128)
    x, y = (sampler.normal(1, n, heads, dim) for n in (text, image))
    a, b = (1 + 0.2 * sampler.normal(dim) for _ in range(2))
    return x, y, a, b, *rope_tables(text + image, dim, setup.device)


def _norm_rope(x: Tensor, y: Tensor, a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return qk_norm_rope([(x, a, None), (y, b, None)], cos, sin, eps=EPS)


def _norm_rope_form(x: Tensor, y: Tensor, a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    z = torch.cat([F.rms_norm(x, (x.shape[3],), a, EPS), F.rms_norm(y, (y.shape[3],), b, EPS)], 1)
    wide = torch.promote_types(z.dtype, torch.float32)
    real, imaginary = z.to(wide).unflatten(3, (-1, 2)).unbind(4)
    rotated = torch.stack([-imaginary, real], 4).flatten(3)
    return (z.to(wide) * cos[:, None] + rotated * sin[:, None]).to(z.dtype)


def _latents(setup: Setup, sampler: Sampler) -> Inputs:
    """FLUX's packed latents of two panels, and a mask of 30 % of the tokens."""
    tokens = 40 if setup.dry else 9216
    parts = [sampler.normal(1, tokens, 64) for _ in range(3)]
    mask = sampler.uniform(1, tokens, 1) < 0.3
    return (*parts, mask, torch.full((), 0.6, device=setup.device))


def _blend_form(generated: Tensor, source: Tensor, noise: Tensor, mask: Tensor, sigma: Tensor) -> Tensor:
    wide = torch.promote_types(generated.dtype, torch.float32)
    known = (1 - sigma.to(wide)) * source.to(wide) + sigma.to(wide) * noise.to(wide)
    return torch.where(mask, generated, known.to(generated.dtype))


def _features(setup: Setup, sampler: Sampler) -> Inputs:
    """A UNet's features and a style's, whose means are far from zero: sums of squares must be shifted."""
    size = (2, 3, 9, 7) if setup.dry else (2, 640, 64, 64)
    return sampler.normal(*size) + 8, 0.5 * sampler.normal(*size) - 3


def _adain_form(x: Tensor, style: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    (v, m), (w, n) = (torch.var_mean(t.to(wide), (2, 3), keepdim=True) for t in (x, style))
    return ((x.to(wide) - m) / (v + 1e-5).sqrt() * (w + 1e-5).sqrt() + n).to(x.dtype)


def _queries(setup: Setup, sampler: Sampler) -> Inputs:
    size = (1, 6 * 6, 2, 8) if setup.dry else (2, 64 * 64, 10, 64)
    return (sampler.normal(*size),)


def _blur(q: Tensor) -> Tensor:
    side = math.isqrt(q.shape[1])
    return query_blur(q, (side, side), side / 16)


def _blur_form(q: Tensor) -> Tensor:
    """Two one-dimensional convolutions over the grid, reflected at its borders."""
    side, batch, heads, dim = math.isqrt(q.shape[1]), q.shape[0], *q.shape[2:]
    sigma = side / 16
    wanted = math.ceil(6 * sigma)
    size = min(wanted + 1 - wanted % 2, side - 1 + side % 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    at = torch.arange(size, dtype=wide, device=q.device) - size // 2
    taps = torch.softmax(-(at**2) / (2 * sigma**2), 0).expand(heads * dim, 1, -1)
    x = q.reshape(batch, side, side, heads * dim).permute(0, 3, 1, 2).to(wide)
    x = F.conv2d(F.pad(x, (size // 2,) * 2 + (0, 0), mode="reflect"), taps[:, :, None], groups=heads * dim)
    x = F.conv2d(F.pad(x, (0, 0) + (size // 2,) * 2, mode="reflect"), taps[..., None], groups=heads * dim)
    return x.permute(0, 2, 3, 1).reshape(q.shape).to(q.dtype)


def _attended(setup: Setup, sampler: Sampler) -> Inputs:
    """q, k, and the lse of their attention."""
    tokens, heads, dim = (60, 2, 16) if setup.dry else (4608, 24, 128)
    q, k = (sampler.normal(1, tokens, heads, dim) for _ in range(2))
    return q, k, _lse(setup, q, k)


def _lse(setup: Setup, q: Tensor, k: Tensor) -> Tensor:
    _, stats = attention(q, k, k, backend=setup.backend, return_stats=True)
    return stats.lse


def _column_form(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    mass = torch.empty(q.shape[0], q.shape[2], k.shape[1], dtype=wide, device=q.device)
    for h in range(q.shape[2]):  # one head at a time: 24 float64 maps would not fit
        s = q[:, :, h].to(wide) @ k[:, :, h].to(wide).mT * q.shape[3] ** -0.5
        mass[:, h] = (s - lse[:, h].to(wide)).exp().sum(1)
    return mass


OPERATORS = (
    Operator("qk_norm_rope", _streams, _norm_rope, _norm_rope_form, "the tables"),
    Operator("blend_latents", _latents, blend_latents, _blend_form, "nothing"),
    Operator("adain", _features, adain, _adain_form, "that statistics need a pass of their own", 64),
    Operator("query_blur", _queries, _blur, _blur_form, "nothing", 16),
    Operator("column_mass", _attended, column_mass, _column_form, "the matrix product", 64),
)


@torch.no_grad()
def measure(setup: Setup, operator: Operator) -> Row:
    """One row of the results, as forward.measure's; gb_per_s: inputs and output moved once, over the time."""
    device = setup.device

    def draw(seed: int) -> Inputs:
        return operator.draw(setup, Sampler(seed, torch.bfloat16, device))

    first = draw(0)
    count = input_sets(device, sum(t.numel() * t.element_size() for t in first))
    groups = [first, *(draw(i) for i in range(1, count))]
    exact = operator.form(*(t.double() if t.is_floating_point() else t for t in first))
    eager = operator.form(*first)
    calls: dict[str, list[Callable[[], Tensor]]] = {}
    errors, missing, failures = {}, {}, {}
    for name, call in (("ours", operator.ours), ("torch", operator.form)):
        with judged(name, missing, failures, device, ours=name == "ours"):
            errors[name] = check(operator, name, call(*first), exact, eager)
            calls[name] = [lambda call=call, inputs=inputs: call(*inputs) for inputs in groups]
    samples = time_on_device(calls, device, setup.seconds(0.5)) if calls else {}
    moved = sum(t.numel() * t.element_size() for t in (*first, eager))
    return {
        "section": "around",
        "operator": operator.name,
        "dtype": dtype_name(eager.dtype),
        "shape": {"inputs": [list(t.shape) for t in first]},
        "bytes": moved,
        "bytes_leave_out": operator.work,
        "seconds": seconds_cells(samples),
        "replay_seconds": time_replays(calls, device),
        "gb_per_s": {n: round(moved / spread(s).median / 1e9, 1) for n, s in samples.items()},
        "ratios": ratio_cells({"ours/torch": ratio(samples, "ours", "torch")} if len(samples) == 2 else {}),
        "errors": errors,
        "missing": missing,
        "failures": failures,
    }


def check(operator: Operator, name: str, out: Tensor, exact: Tensor, eager: Tensor) -> dict[str, float]:
    """Errors of a result, as float64_check.compare reports them."""
    # In float32 the form's sums round as often as ours, in another order: a few eps on top.
    more = (8 + operator.magnified) * torch.finfo(torch.float32).eps * float(exact.abs().max())
    return compare(f"{operator.name}, {name}", out, exact, eager, eager.dtype, more=more)


@torch.no_grad()
def checks(setup: Setup) -> Row:
    """Every operator at a small size in three dtypes, and options that are not timed: masks, offsets ..."""
    tiny = replace(setup, dry=True)
    errors, missing, failures = {}, {}, {}
    sampler = Sampler(3, torch.bfloat16, setup.device)

    def one(label: str, run: Callable[[], dict[str, float]]) -> None:
        with judged(label, missing, failures, setup.device):
            errors[label] = run()

    for operator in OPERATORS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            inputs = [t.to(dtype) if t.dtype == torch.bfloat16 else t for t in operator.draw(tiny, sampler)]
            if operator.name == "column_mass":
                inputs[2] = _lse(setup, inputs[0], inputs[1])
            exact = operator.form(*(t.double() if t.is_floating_point() else t for t in inputs))
            eager = operator.form(*inputs)
            label = f"{operator.name}, {dtype_name(dtype)}"
            one(label, lambda o=operator, i=inputs, x=exact, e=eager: check(o, "ours", o.ours(*i), x, e))
    for label, run in _option_checks(tiny, sampler).items():
        one(label, run)
    return {"section": "checks", "errors": errors, "missing": missing, "failures": failures}


def _option_checks(setup: Setup, sampler: Sampler) -> dict[str, Callable[[], dict[str, float]]]:
    generated, source, noise, mask, _ = _latents(setup, sampler)
    x, style = _features(setup, sampler)
    where = sampler.uniform(2, 1, 9, 7) < 0.6
    a, b, wa, wb, cos, sin = _streams(setup, sampler)
    order = torch.randperm(a.shape[1] + b.shape[1], generator=sampler.generator, device=setup.device)

    def blended() -> dict[str, float]:
        out = blend_latents(generated, source, noise, mask, 0.0)
        return _equal("blend_latents, sigma 0", out, torch.where(mask, generated, source))

    def mixed() -> dict[str, float]:
        soft = sampler.uniform(*mask.shape)
        wide = [t.double() for t in (generated, source, noise, soft)]
        exact = wide[3] * wide[0] + (1 - wide[3]) * (0.75 * wide[1] + 0.25 * wide[2])
        out = blend_latents(generated, source, noise, soft, 0.25)
        # The eager form rounds the known part, then the mixture.
        known = (0.75 * source.float() + 0.25 * noise.float()).to(source.dtype)
        eager = (soft * generated.float() + (1 - soft) * known.float()).to(source.dtype)
        return compare("blend_latents, soft mask", out, exact, eager, source.dtype)

    def styled() -> dict[str, float]:
        exact, eager = (_masked_adain(t, s, where) for t, s in ((x.double(), style.double()), (x, style)))
        return compare("adain, mask", adain(x, style, where, where), exact, eager, x.dtype)

    def turned() -> dict[str, float]:
        out = qk_norm_rope(
            [(a, wa, b[:, :1]), (b, wb, None)], cos, sin, eps=EPS, rope="half", permutation=order
        )
        exact, eager = (
            _half_form([t.to(d) for t in (a, b, wa, wb)], cos, sin, order) for d in (torch.float64, a.dtype)
        )
        return compare("qk_norm_rope, half, offset, permutation", out, exact, eager, a.dtype)

    def flat() -> dict[str, float]:
        (q,) = _queries(setup, sampler)
        side = math.isqrt(q.shape[1])
        exact = q.double().mean(1, keepdim=True).expand_as(q)
        return compare(
            "query_blur, sigma inf", query_blur(q, (side, side), math.inf), exact, exact.to(q.dtype), q.dtype
        )

    return {f.__name__: f for f in (blended, mixed, styled, turned, flat)}


def _equal(name: str, out: Tensor, expected: Tensor) -> dict[str, float]:
    if not torch.equal(out, expected):
        raise WrongResult(f"{name}: {int((out != expected).sum())} elements are not the same bits")
    return {"max_error": 0.0}


def _masked_adain(x: Tensor, style: Tensor, mask: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)

    def statistics(t: Tensor) -> tuple[Tensor, Tensor]:
        inside = [
            [image[c][m[0]] for c in range(t.shape[1])] for image, m in zip(t.to(wide), mask, strict=True)
        ]
        mean = torch.stack([torch.stack([v.mean() for v in image]) for image in inside])
        deviation = torch.stack([torch.stack([(v.var() + 1e-5).sqrt() for v in image]) for image in inside])
        return mean[..., None, None], deviation[..., None, None]

    (m, s), (n, t) = statistics(x), statistics(style)
    return torch.where(mask, ((x.to(wide) - m) / s * t + n).to(x.dtype), x)


def _half_form(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, order: Tensor) -> Tensor:
    a, b, wa, wb = tensors
    wide = torch.promote_types(a.dtype, torch.float32)
    z = torch.cat(
        [F.rms_norm(a, (a.shape[3],), wa, EPS) + b[:, :1], F.rms_norm(b, (b.shape[3],), wb, EPS)], 1
    ).to(wide)
    left, right = z.chunk(2, 3)
    out = z * cos[:, None] + torch.cat([-right, left], 3) * sin[:, None]
    return out.to(a.dtype)[:, order]

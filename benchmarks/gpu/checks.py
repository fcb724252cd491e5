"""Every feature of attention, forward and backward, against float64 on random inputs and outputs that hold
NaN before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...bindings import Contrast, HeadGain, attention
from ..cases.dense import Answer, Problem, answer
from ..cases.truth import WrongResult, compare
from ..cpu.forward import Row
from .machine import Setup, judged

ROWS = {"prompt": 33, "subject": 70, "target": 150}
DIMS = (32, 40, 64, 80, 96, 128, 160, 256)
# lse, mass per row and gain come from products of the inputs as they are, so that they agree to float32 in
# every dtype.
STATISTICS = {"lse": 3e-5, "mass": 3e-5, "gain": 1.5e-3}
Feature = Callable[["Draw"], Problem]


@dataclass(frozen=True)
class Draw:
    """Random tensors of one dtype and head dim; the same for the same name."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    generator: torch.Generator
    batch: int = 2
    heads: int = 4

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device)

    def tokens(self, count: int, heads: int | None = None, batch: int | None = None) -> Tensor:
        size = (
            self.batch if batch is None else batch,
            count,
            self.heads if heads is None else heads,
            self.dim,
        )
        return self.normal(*size).to(self.dtype)

    def problem(
        self, rows: dict | None = None, keys: dict | None = None, kv_heads: int | None = None, **options: Any
    ):
        rows = ROWS if rows is None else rows
        keys = rows if keys is None else keys
        # Heads look differently at the first keys, so that a gain derived from their mass is well
        # conditioned.
        q, k = self.tokens(_total(rows)) + self.dim**-0.25, self.tokens(_total(keys), kv_heads)
        first = int(torch.as_tensor(next(iter(keys.values()))).max())
        k[:, :first] += torch.linspace(-1, 1, k.shape[2], device=self.device)[:, None].to(k) * self.dim**-0.25
        return Problem(q, k, self.tokens(_total(keys), kv_heads), rows, keys, options)


def _total(lengths: dict) -> int:
    return int(sum(torch.as_tensor(n).flatten()[0] for n in lengths.values()))


def _plain(d: Draw) -> Problem:
    q, k, v = d.tokens(253), d.tokens(253), d.tokens(253)
    return Problem(q, k, v, {"all": 253}, {"all": 253})


def _head_gain(norm: Any) -> Feature:
    rule = HeadGain(rows="target", keys="prompt", norm=norm, span=0.3, apply_to=["subject", "target"])
    return lambda d: d.problem(head_gain=rule, gain={"target": 0.5})


def _removed(d: Draw) -> Problem:
    """Keys that no row sees hold NaN."""
    p = d.problem(bias={("*", "subject"): -math.inf, ("target", "prompt"): 1.5})
    for t in (p.k, p.v):
        assert isinstance(t, Tensor)
        t[:, 33:103] = float("nan")
    return p


def _tables(d: Draw) -> Problem:
    """A number for each batch item and head, in every table; a row without any key in its group."""
    return d.problem(
        bias={("*", "prompt"): d.normal(d.batch, d.heads), ("prompt", "subject"): -math.inf},
        weight={("target", "*"): d.normal(d.batch, d.heads).abs(), ("subject", "target"): 0.0},
        gain={"subject": d.normal(d.heads)},
        groups={"a": ["subject"], "b": ["prompt", "target"]},
    )


def _groups(d: Draw) -> Problem:
    gate = torch.rand(d.batch, 253, generator=d.generator, device=d.device)
    groups = {"image": ["subject", "target"], "text": ["prompt"]}
    return d.problem(groups=groups, gates={"image": gate, "text": 0.7}, weight={("*", "subject"): 1.4})


def _contrast(clip: tuple[float, float] | None) -> Feature:
    return lambda d: d.problem(contrast=Contrast(1.67, clip))


def _contrast_of_a_group(d: Draw) -> Problem:
    groups = {"text": ["prompt"], "image": ["subject", "target"]}
    return d.problem(
        groups=groups, contrast={"image": Contrast(2.0, (0.0, 0.1))}, weight={("target", "subject"): 1.3}
    )


def _valid(d: Draw) -> Problem:
    return d.problem(
        valid={
            "prompt": torch.tensor([7, 33], device=d.device),
            "target": torch.tensor([150, 64], device=d.device),
        }
    )


def _items(d: Draw) -> Problem:
    first = torch.tensor([20, 121])
    lengths = {"prompt": first, "subject": 203 - first, "target": 50}
    return d.problem(lengths, lengths, weight={("target", "prompt"): 1.3, ("subject", "*"): 0.6})


def _source(d: Draw) -> Problem:
    """SD-VICL's: an output item reads queries, keys and values of others."""
    index = {"q": torch.tensor([2, 0, 1]), "k": torch.tensor([0, 0, 2]), "v": torch.tensor([1, 0, 2])}
    p = replace(d, batch=3).problem(weight={("target", "prompt"): 1.3})
    return replace(p, source={name: i.to(d.device) for name, i in index.items()})


def _lists(d: Draw) -> Problem:
    """A tensor for each key segment, of other strides, one of them for all items."""
    p = d.problem(weight={("target", "reference"): 1.2}, keys={"text": 40, "reference": 130, "own": 253})
    keys = [
        d.normal(d.batch, d.heads, 40, d.dim).to(d.dtype).transpose(1, 2),
        d.tokens(130, batch=1),
        d.tokens(253),
    ]
    values = [d.tokens(40), d.normal(1, 130, d.heads, d.dim + 8).to(d.dtype)[..., : d.dim], d.tokens(253)]
    return replace(p, k=keys, v=values)


def _strides(d: Draw) -> Problem:
    p = d.problem(weight={("target", "prompt"): 1.3})
    q, k, v = (d.normal(3, d.batch, d.heads, 253, d.dim).to(d.dtype)[i].transpose(1, 2) for i in range(3))
    return replace(p, q=q, k=k, v=v)


def _gqa(d: Draw) -> Problem:
    return d.problem(kv_heads=2, weight={("target", "prompt"): 1.3}, head_gain=HeadGain())


def _few_rows(d: Draw) -> Problem:
    return d.problem(
        {"target": 5, "empty": 0}, {"prompt": 77, "none": 0, "image": 300}, weight={("target", "image"): 0.4}
    )


def _scales(d: Draw) -> Problem:
    scale = (0.5 + torch.rand(d.batch, d.heads, generator=d.generator, device=d.device)) * d.dim**-0.5
    scale[0, 0] *= -1
    return replace(d.problem(weight={("target", "prompt"): 1.3}), scale=scale)


def _words(d: Draw) -> Problem:
    """Prompt-to-Prompt: each of 77 tokens is a key segment with a weight of its own."""
    keys = {f"word_{i}": 1 for i in range(77)}
    weight = {("image", word): 0.5 + i / 76 for i, word in enumerate(keys)}
    return d.problem({"image": 200}, keys, weight=weight)


def _brush(d: Draw) -> Problem:
    return d.problem(weight={("target", "prompt"): 1.3, ("target", "subject"): 1.3}, head_gain=HeadGain())


FEATURES: dict[str, Feature] = {
    "plain": _plain,
    "shift": lambda d: d.problem(weight={("target", "prompt"): 1.3, ("target", "subject"): 1.3}),
    "brush": _brush,
    "gain by mean": _head_gain("mean"),
    "gain by max": _head_gain("max"),
    "gain by softmax": _head_gain("softmax"),
    "removed keys": _removed,
    "tables per item and head": _tables,
    "groups and gates": _groups,
    "contrast, clipped": _contrast((0.0, 1.0)),
    "contrast, linear": _contrast(None),
    "contrast of a group": _contrast_of_a_group,
    "valid keys": _valid,
    "lengths per item": _items,
    "source": _source,
    "key lists": _lists,
    "strides": _strides,
    "grouped queries": _gqa,
    "few rows": _few_rows,
    "scale per head": _scales,
    "one-token segments": _words,
}
DIFFERENTIABLE = (
    "plain",
    "shift",
    "brush",
    "removed keys",
    "tables per item and head",
    "groups and gates",
    "valid keys",
    "source",
    "key lists",
    "strides",
    "grouped queries",
    "few rows",
    "one-token segments",
)
FORWARD_GROUPS = {f"features {i + 1}": tuple(FEATURES)[i::3] for i in range(3)}


def draw(setup: Setup, label: str, dtype: torch.dtype, dim: int) -> Problem:
    seed = sum(ord(letter) for letter in label)
    return FEATURES[label](Draw(setup.device, dtype, dim, torch.Generator(setup.device).manual_seed(seed)))


@torch.no_grad()
def features(setup: Setup, labels: tuple[str, ...]) -> Row:
    """The features in bfloat16 at head dim 128 (a dry run: 32)."""
    return _row(setup, {label: _forward(label, torch.bfloat16, 32 if setup.dry else 128) for label in labels})


@torch.no_grad()
def dims_and_dtypes(setup: Setup) -> Row:
    """Every fast head dim in bfloat16, every dtype at head dims 64 and 128, with In-Context Brush; an odd
    one.
    """
    cases = [("brush", torch.bfloat16, dim) for dim in ((40,) if setup.dry else (*DIMS, 72)) if dim != 128]
    cases += [
        ("brush", dtype, dim)
        for dtype in (torch.float16, torch.float32)
        for dim in (64, 128)[: 2 - setup.dry]
    ]
    return _row(setup, {f"{a}, {str(t)[6:]}, D {d}": _forward(a, t, d) for a, t, d in cases})


@torch.no_grad()
def repeats(setup: Setup) -> Row:
    """A thousand calls on the same inputs, bitwise the same: what is read before it was written shows sooner
    or later.
    """
    dims = (32,) if setup.dry else (64, 128)
    return _row(setup, {f"{setup.backend}, D {dim}, repeated": _repeated(dim) for dim in dims})


def _repeated(dim: int) -> Callable[[Setup, str], Row]:
    def check(setup: Setup, label: str) -> Row:
        generator = torch.Generator(setup.device).manual_seed(5)
        rows = (
            {"prompt": 33, "subject": 70, "target": 150}
            if setup.dry
            else {"prompt": 333, "subject": 700, "target": 1500}
        )
        p = Draw(setup.device, torch.bfloat16, dim, generator, heads=4 if setup.dry else 24).problem(
            rows, weight={("target", "prompt"): 1.3, ("target", "subject"): 1.3}, head_gain=HeadGain()
        )
        control = p.control()
        first, stats = attention(p.q, p.k, p.v, control, backend=setup.backend, return_stats=True)
        times = 3 if setup.dry else 1000
        for i in range(times):
            again, other = attention(p.q, p.k, p.v, control, backend=setup.backend, return_stats=True)
            same = [torch.equal(a, b) for a, b in zip((first, *stats), (again, *other), strict=True)]
            if not all(same):
                names = [
                    name for name, fine in zip(("out", "lse", "mass", "gain"), same, strict=True) if not fine
                ]
                raise WrongResult(f"{label}: call {i + 1} differs in {', '.join(names)}")
        return {"repeats": times}

    return check


def gradients(setup: Setup) -> Row:
    """dq, dk and dv of the features that have them, in bfloat16 at head dim 128, and in float32 at 64."""
    dim = 32 if setup.dry else 128
    cases = {f"{label}, backward": _backward(label, torch.bfloat16, dim) for label in DIFFERENTIABLE}
    cases["shift, float32, D 64, backward"] = _backward("shift", torch.float32, 64)
    with torch.enable_grad():
        return _row(setup, cases)


def _row(setup: Setup, cases: dict[str, Callable[[Setup, str], Row]]) -> Row:
    row: Row = {"section": "checks"}
    errors, missing, failures = {}, {}, {}
    for label, case in cases.items():
        with judged(label, missing, failures, setup.device):
            errors[label] = case(setup, label)
    return {**row, "errors": errors, "missing": missing, "failures": failures}


def _forward(feature: str, dtype: torch.dtype, dim: int) -> Callable[[Setup, str], Row]:
    def check(setup: Setup, label: str) -> Row:
        p = draw(setup, feature, dtype, dim)
        exact, eager = answer(p, torch.float64), answer(p, torch.float32, dtype)
        out = torch.full(exact.out.shape, float("nan"), dtype=dtype, device=setup.device)
        control, more = p.control(), {"backend": setup.backend, **p.keywords}
        attention(p.q, p.k, p.v, control, out=out, **more)
        again, stats = attention(p.q, p.k, p.v, control, return_stats=True, **more)
        report: Row = {**compare(label, out, exact.out, eager.out, dtype, more=slack(exact, p))}
        compare(f"{label}, with statistics", again, exact.out, eager.out, dtype, more=slack(exact, p))
        rows = max(p.q.shape[1], 1)
        for name, got, expected in (
            ("lse", stats.lse, exact.lse),
            ("mass", stats.mass / rows, exact.mass / rows),
            ("gain", stats.gain, exact.gain),
        ):
            report[name] = statistic(f"{label}, {name}", got, expected, STATISTICS[name])
        if not torch.equal(out, attention(p.q, p.k, p.v, control, **more)):
            raise WrongResult(f"{label}: two calls on the same inputs differ")
        return report

    return check


def slack(exact: Answer, p: Problem) -> float:
    """What float32 sums may differ by in their order; contrast's two terms nearly cancel."""
    few = p.q.numel() < 512 or exact.mass.shape[3] > 32
    return exact.magnitude * (8 * torch.finfo(torch.float32).eps + few * torch.finfo(p.q.dtype).eps)


def statistic(name: str, got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest error over max(1, the expected size); infinities must agree.

    Raises:
        WrongResult: they do not, or the error is larger than the tolerance.
    """
    infinite = torch.isinf(expected)
    if got.shape != expected.shape or not torch.equal(got.double()[infinite], expected.double()[infinite]):
        raise WrongResult(f"{name}: another shape, or not -inf where a row has no key")
    error = ((got.double() - expected) / expected.abs().clamp(min=1.0))[~infinite].abs()
    most = float(error.max()) if error.numel() else 0.0
    if not most <= tolerance:  # a NaN must fail
        raise WrongResult(f"{name}: error {most:.3g} against float64, allowed {tolerance:g}")
    return most


def _backward(feature: str, dtype: torch.dtype, dim: int) -> Callable[[Setup, str], Row]:
    def check(setup: Setup, label: str) -> Row:
        p = draw(setup, feature, dtype, dim)
        control, more = p.control(), {"backend": setup.backend, **p.keywords}
        probe = attention(p.q, p.k, p.v, control, **more)
        generator = torch.Generator(setup.device).manual_seed(7)
        grad = torch.randn(probe.shape, generator=generator, device=setup.device).to(dtype)

        def run(wide: torch.dtype, forward: Callable[[Problem], Tensor]) -> list[Tensor]:
            # Leaves of each form's own, so that each rounds its gradients as it does.
            leaves = [[t.detach().to(wide).requires_grad_() for t in _listed(ts)] for ts in (p.q, p.k, p.v)]
            q, k, v = (ts if isinstance(given, list) else ts[0] for ts, given in zip(leaves, (p.q, p.k, p.v)))
            flat = [t for ts in leaves for t in ts]
            return list(torch.autograd.grad(forward(replace(p, q=q, k=k, v=v)), flat, grad.to(wide)))

        exact = run(torch.float64, lambda x: answer(x, torch.float64).out)
        eager = run(torch.float32, lambda x: answer(x, torch.float32, dtype).out)
        got = run(dtype, lambda x: attention(x.q, x.k, x.v, control, **more))
        report: Row = {}
        names = [f"d{n}, tensor {i}" for n, t in zip("qkv", (p.q, p.k, p.v)) for i in range(len(_listed(t)))]
        for name, mine, truth, allowed in zip(names, got, exact, eager, strict=True):
            more_allowed = 4 * torch.finfo(dtype).eps * float(truth.abs().max())
            report[name] = compare(
                f"{label}, {name}", mine, truth, allowed.to(dtype), dtype, more=more_allowed
            )
        return report

    return check


def _listed(t: Tensor | list[Tensor]) -> list[Tensor]:
    return t if isinstance(t, list) else [t]

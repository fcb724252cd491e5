"""Whether a result is right: a sample of its rows against float64, before any time is taken."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...bindings import Contrast
from ..cpu.peers import Case
from .shapes import Shape

CHUNK = 1 << 25  # elements of the map that are held at a time


class WrongResult(RuntimeError):
    """A contestant's result is wrong; nothing that was measured beside it is reported."""


class Truth:
    """A case in float64, for a sample of rows of all heads, from the operator's formula and by no backend.

    The allowance is the error of the eager form in float32 that rounds its probabilities and output to the
    dtype.

    Args:
        inputs: q, k and v in float64 where the case's are already rounded; by default the case's own.
    """

    def __init__(
        self, case: Case, controlled: bool, inputs: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> None:
        shape, device = case.shape, case.q.device
        places = sample(shape.rows)
        self.rows = torch.tensor([row for _, row in places], device=device)
        terms = Terms(shape, [name for name, _ in places], device) if controlled else Terms.plain()
        exact = (case.q, case.k, case.v) if inputs is None else inputs
        gain = torch.ones(shape.batch, shape.heads, dtype=torch.float64, device=device)
        eager_gain = gain
        if controlled and shape.head_gain is not None:
            gain = head_gain(shape, exact[0], exact[1])
            eager_gain = gain if inputs is None else head_gain(shape, case.q, case.k)
        self.exact = torch.empty(
            shape.batch, len(places), shape.heads, shape.dim, dtype=torch.float64, device=device
        )
        self.eager = torch.empty_like(self.exact)
        self.magnitude = 0.0  # largest sum of the terms' sizes
        for b, h in itertools.product(range(shape.batch), range(shape.heads)):
            r, c, x = (
                t[b, rows, h].double() for t, rows in zip(exact, (self.rows, slice(None), slice(None)))
            )
            self.exact[b, :, h] = gain[b, h] * terms.attend(r, c, x, torch.float64)
            sizes = terms.attend(r, c, x.abs(), torch.float64, absolute=True)
            self.magnitude = max(self.magnitude, float(sizes.max()))
            eager = terms.attend(
                case.q[b, self.rows, h].float(), case.k[b, :, h].float(), case.v[b, :, h].float(), case.dtype
            )
            self.eager[b, :, h] = (eager_gain[b, h].float() * eager).to(case.dtype).double()
        self.dtype = case.dtype

    def check(self, name: str, out: Tensor, slack: float = 2.0) -> dict[str, float]:
        """Mean and max error of `out` (batch, rows, heads, dim), and the eager form's.

        Raises:
            WrongResult: a value is not finite, or an error exceeds `slack` times the eager form's plus half
                an ulp of the largest value.
        """
        order = 8 * torch.finfo(torch.float32).eps * self.magnitude  # of float32 sums
        return compare(name, out, self.exact, self.eager, self.dtype, slack, order, self.rows)


def compare(
    name: str,
    out: Tensor,
    exact: Tensor,
    eager: Tensor,
    dtype: torch.dtype,
    slack: float = 2.0,
    more: float = 0.0,
    rows: Tensor | None = None,
) -> dict[str, float]:
    """Mean and max error of `out` against `exact`, and the eager form's; `rows`: those of out, dimension 1,
    that count.

    Raises:
        WrongResult: a value of out is not finite, or an error exceeds `slack` times the eager form's plus
            `more` and half an ulp of the largest value.
    """
    if not bool(torch.isfinite(out).all()):
        raise WrongResult(f"{name}: the output has values that are not finite")
    if rows is not None:
        out = out[:, rows]
    if out.shape != exact.shape:
        raise WrongResult(f"{name}: expected the shape {tuple(exact.shape)}, got {tuple(out.shape)}")
    error, allowed = (out.double() - exact).abs(), (eager.double() - exact).abs()
    ulp = 0.5 * torch.finfo(dtype).eps * float(exact.abs().max()) + more
    report: dict[str, float] = {}
    for what, mine, theirs in (
        ("mean", error.mean(), allowed.mean()),
        ("max", error.max(), allowed.max()),
    ):
        if not float(mine) <= slack * float(theirs) + ulp:
            raise WrongResult(
                f"{name}: {what} error {float(mine):.3g} against float64; "
                f"allowed {slack:g} x {float(theirs):.3g} + {ulp:.3g}"
            )
        report[f"{what}_error"] = float(mine)
        report[f"{what}_error_eager"] = float(theirs)
    return report


class Terms:
    """What a control does to some rows of one head, as dense tables: the formula's right-hand side."""

    def __init__(self, shape: Shape, row_names: Sequence[str], device: torch.device) -> None:
        keys, names = spans(shape.keys), list(shape.rows)
        table = torch.ones(len(names), shape.n_keys, dtype=torch.float64)
        for (row, key), value in shape.weight.items():
            if row in shape.rows:
                table[names.index(row), keys[key]] = value
        labels = torch.tensor([names.index(name) for name in row_names], device=device)
        self.weight: Tensor | None = table.to(device)[labels]
        self.groups: list[Tensor] | None = None
        self.gates = [1.0]
        if shape.groups is not None:
            places = [
                [torch.arange(shape.n_keys)[keys[key]] for key in names] for names in shape.groups.values()
            ]
            self.groups = [torch.cat(parts).to(device) for parts in places]
            self.gates = [shape.gates.get(name, 1.0) for name in shape.groups]
        self.contrast = shape.contrast

    @staticmethod
    def plain() -> Terms:
        terms = object.__new__(Terms)
        terms.weight, terms.groups, terms.gates, terms.contrast = None, None, [1.0], None
        return terms

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rounding: torch.dtype, absolute: bool = False
    ) -> Tensor:
        """q (rows, dim), k and v (keys, dim) -> (rows, dim); the probabilities are rounded to a dtype.

        absolute: the sum of the terms' sizes, where v is given as its sizes.
        """
        s = q @ k.T * q.shape[1] ** -0.5
        weight = None if self.weight is None else self.weight.to(q.dtype)
        out = torch.zeros_like(q)
        for group, gate in zip(self.groups or [slice(None)], self.gates, strict=True):
            p = torch.softmax(s[:, group], -1).to(rounding).to(q.dtype)
            if self.contrast is not None:
                p = contrasted(p, self.contrast, p.shape[1], absolute).to(rounding).to(q.dtype)
            out += gate * ((p if weight is None else p * weight[:, group]) @ v[group])
        return out


def contrasted(p: Tensor, contrast: Contrast, count: Tensor | int, absolute: bool = False) -> Tensor:
    """clip(beta * p - (beta - 1) / count, lo, hi); absolute: beta * p + |beta - 1| / count, what was added
    up.
    """
    if absolute:
        return abs(contrast.beta) * p + abs(contrast.beta - 1) / count
    p = contrast.beta * p - (contrast.beta - 1) / count
    return p if contrast.clip is None else p.clamp(*contrast.clip)


def head_gain(shape: Shape, q: Tensor, k: Tensor) -> Tensor:
    """(batch, heads): In-Context Brush's min-max gain, from the mass of its block in float64; the map goes by
    chunks.
    """
    spec = shape.head_gain
    assert (
        spec is not None
        and isinstance(spec.rows, str)
        and isinstance(spec.keys, str)
        and spec.norm == "minmax"
    )
    rows, keys = spans(shape.rows)[spec.rows], spans(shape.keys)[spec.keys]
    mass = torch.zeros(shape.batch, shape.heads, dtype=torch.float64, device=q.device)
    for b, h in itertools.product(range(shape.batch), range(shape.heads)):
        c = k[b, :, h].double()
        for part in chunks(rows, shape.n_keys):
            s = q[b, part, h].double() @ c.T * shape.dim**-0.5
            lse = torch.logsumexp(s, -1, keepdim=True)
            mass[b, h] += (s[:, keys] - lse).exp().sum()
    mass /= rows.stop - rows.start
    low, high = mass.amin(1, keepdim=True), mass.amax(1, keepdim=True)
    return spec.floor + spec.span * (mass - low) / (high - low + torch.finfo(torch.float32).eps)


def sample(lengths: Mapping[str, int]) -> list[tuple[str, int]]:
    """(segment, row) of the first and the last row of every segment, and of one between."""
    starts = spans(lengths)
    return [
        (name, starts[name].start + i) for name, n in lengths.items() for i in sorted({0, n // 3, n - 1}) if n
    ]


def chunks(rows: slice, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK // columns)
    return (slice(i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step))


def spans(lengths: Mapping[str, int]) -> dict[str, slice]:
    ends = list(itertools.accumulate(lengths.values()))
    return {name: slice(end - n, end) for (name, n), end in zip(lengths.items(), ends, strict=True)}

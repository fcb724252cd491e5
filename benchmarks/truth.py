"""Whether a result is right: a sample of its rows against float64, before any time is taken."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from .peers import Case


class WrongResult(RuntimeError):
    """A contestant's result is wrong; nothing that was measured beside it is reported."""


class Truth:
    """A case in float64, for a sample of rows of all heads, from the operator's formula and by no backend.

    The allowance is the error of the eager form in float32 that rounds its probabilities and output to the dtype.
    """

    def __init__(self, case: Case, controlled: bool) -> None:
        shape = case.shape
        starts = dict(zip(shape.rows, itertools.accumulate(shape.rows.values(), initial=0), strict=False))
        places = [
            (name, starts[name] + i)
            for name, n in shape.rows.items()
            for i in sorted({0, n // 3, n - 1})
            if n
        ]
        self.rows = torch.tensor([row for _, row in places])
        weight = torch.ones(len(places), shape.n_keys, dtype=torch.float64)
        gain = torch.ones(shape.batch, shape.heads, dtype=torch.float64)
        if controlled:
            keys = _spans(shape.keys)
            for i, (name, _) in enumerate(places):
                for (row, key), value in shape.weight.items():
                    if row == name:
                        weight[i, keys[key]] = value
            if shape.head_gain is not None:
                gain = self._gain(case)
        q, k, v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
        self.exact = torch.empty(shape.batch, len(places), shape.heads, shape.dim, dtype=torch.float64)
        self.eager = torch.empty_like(self.exact)
        self.magnitude = 0.0  # largest sum of the terms' sizes
        for b, h in itertools.product(range(shape.batch), range(shape.heads)):
            rows, keys, values = q[b, h, self.rows], k[b, h], v[b, h]
            r, c, x = rows.double(), keys.double(), values.double()
            self.exact[b, :, h] = gain[b, h] * _attend(r, c, x, weight, torch.float64)
            sizes = _attend(r, c, x.abs(), weight, torch.float64)
            self.magnitude = max(self.magnitude, float(sizes.max()))
            eager = _attend(rows.float(), keys.float(), values.float(), weight.float(), case.dtype)
            self.eager[b, :, h] = (gain[b, h].float() * eager).to(case.dtype).double()
        self.dtype = case.dtype

    @staticmethod
    def _gain(case: Case) -> Tensor:
        """(batch, heads): In-Context Brush's min-max gain, from the mass of its block in float64."""
        shape, spec = case.shape, case.shape.head_gain
        assert (
            spec is not None
            and isinstance(spec.rows, str)
            and isinstance(spec.keys, str)
            and spec.norm == "minmax"
        )
        rows, keys = _spans(shape.rows)[spec.rows], _spans(shape.keys)[spec.keys]
        mass = torch.empty(shape.batch, shape.heads, dtype=torch.float64)
        for b, h in itertools.product(range(shape.batch), range(shape.heads)):
            s = case.q[b, rows, h].double() @ case.k[b, :, h].double().T * shape.dim**-0.5
            lse = torch.logsumexp(s, -1, keepdim=True)
            mass[b, h] = (s[:, keys] - lse).exp().sum(-1).mean()
        low, high = mass.amin(1, keepdim=True), mass.amax(1, keepdim=True)
        return spec.floor + spec.span * (mass - low) / (high - low + torch.finfo(torch.float32).eps)

    def check(self, name: str, out: Tensor, slack: float = 2.0) -> dict[str, float]:
        """Mean and max error of `out` (batch, rows, heads, dim), and the eager form's.

        Raises:
            WrongResult: a value is not finite, or an error exceeds `slack` times the eager form's plus half an
                ulp of the largest value.
        """
        if not bool(torch.isfinite(out).all()):
            raise WrongResult(f"{name}: the output has values that are not finite")
        error = (out[:, self.rows].double() - self.exact).abs()
        allowed = (self.eager - self.exact).abs()
        ulp = 0.5 * torch.finfo(self.dtype).eps * float(self.exact.abs().max())
        ulp += 8 * torch.finfo(torch.float32).eps * self.magnitude  # the order of float32 sums
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


def _attend(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, rounding: torch.dtype) -> Tensor:
    """q (rows, dim), k and v (keys, dim), weight (rows, keys); the probabilities are rounded to a dtype."""
    p = torch.softmax(q @ k.T * q.shape[1] ** -0.5, -1)
    return (p.to(rounding).to(q.dtype) * weight) @ v


def _spans(lengths: Mapping[str, int]) -> dict[str, slice]:
    ends = list(itertools.accumulate(lengths.values()))
    return {name: slice(end - n, end) for (name, n), end in zip(lengths.items(), ends, strict=True)}

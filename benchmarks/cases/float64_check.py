"""The check that precedes every time: a result against float64, within the error of an eager form.

Expected values are the reference backend's in float64, on the inputs as they were rounded to the dtype. The
allowance is the error of an eager form: float32 sums, with the probabilities and the output rounded to the
dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...bindings import Control, Segments, Stats, attention
from ...bindings.backends import reference
from ...bindings.core.lowering import lower
from .eager_forms import min_max_gain
from .inputs import Case
from .shapes import Shape

CHUNK = 1 << 25  # elements of one head's attention map that are held at a time
Lengths = Mapping[str, int | Tensor]
Tensors = tuple[Tensor, Tensor, Tensor]


class WrongResult(RuntimeError):
    """A contestant's result is wrong; the message says by how much."""


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
    """Mean and max error of a result, and the eager form's.

    Args:
        name: of the contestant, for the error message.
        out: the result.
        exact: the expected values in float64, of out's shape (or of its `rows`).
        eager: the eager form's values.
        dtype: of the result; half an ulp of the largest expected value is allowed on top.
        slack: how many times the eager form's error is allowed.
        more: allowed on top, in the values' unit.
        rows: indices into out's dimension 1 of those that `exact` and `eager` hold; None: all.

    Raises:
        WrongResult: a value of out is not finite, or its mean or max error exceeds slack times the eager
            form's plus `more` and half an ulp.
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
        if not float(mine) <= slack * float(theirs) + ulp:  # a NaN must fail
            raise WrongResult(
                f"{name}: {what} error {float(mine):.3g} against float64; "
                f"allowed {slack:g} x {float(theirs):.3g} + {ulp:.3g}"
            )
        report[f"{what}_error"] = float(mine)
        report[f"{what}_error_eager"] = float(theirs)
    return report


# Calls of any kind, in full


@dataclass(frozen=True, eq=False)
class FeatureCall:
    """The arguments of one attention call.

    Attributes:
        q: (batch, rows, heads, dim).
        k: (batch, keys, kv_heads, dim), or a list with a tensor for each key segment.
        v: the same.
        rows: lengths of the row segments: ints, or int tensors (batch,).
        keys: lengths of the key segments, the same.
        options: Control's keyword arguments.
        scale: as in flashbrush.attention.
        source: as in flashbrush.attention.
    """

    q: Tensor
    k: Tensor | list[Tensor]
    v: Tensor | list[Tensor]
    rows: Lengths
    keys: Lengths
    options: dict[str, Any] = field(default_factory=dict)
    scale: float | Tensor | None = None
    source: dict[str, Tensor] = field(default_factory=dict)

    def control(self) -> Control | None:
        """The call's control; None where no option is set."""
        if not self.options and len(self.rows) == len(self.keys) == 1:
            return None
        return Control(Segments(dict(self.rows)), Segments(dict(self.keys)), **self.options)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of flashbrush.attention."""
        more = {"control": self.control(), "scale": self.scale, "source": self.source or None}
        return {"q": self.q, "k": self.k, "v": self.v, **more}

    def of(self, change: Callable[[Tensor], Tensor]) -> FeatureCall:
        """The same call with q, k and v changed."""
        q, k, v = (
            [change(t) for t in ts] if isinstance(ts, list) else change(ts) for ts in (self.q, self.k, self.v)
        )
        assert isinstance(q, Tensor)
        return replace(self, q=q, k=k, v=v)


def exact_answer(call: FeatureCall) -> tuple[Tensor, Stats]:
    """(out, stats) in float64."""
    return attention(**call.of(Tensor.double).arguments, backend="reference", return_stats=True)


def eager_output(call: FeatureCall, dtype: torch.dtype) -> Tensor:
    """The eager form's output as float32: float32 sums, probabilities and output rounded to `dtype`."""
    return _eager(call, dtype).to(dtype).float()


def _eager(call: FeatureCall, dtype: torch.dtype) -> Tensor:
    """float32, before the output is rounded."""
    return reference.forward(lower(**call.of(Tensor.float).arguments), round_map_to=dtype).out


def largest_term_sum(call: FeatureCall) -> float:
    """The largest sum of the absolute terms of an output element, before they cancel.

    float32 sums in another order differ by a few eps of it. Contrast adds beta p and subtracts (beta - 1) /
    Nk, whose sizes are summed too.
    """
    contrast = call.options.get("contrast")
    rules = [c for c in (contrast.values() if isinstance(contrast, Mapping) else [contrast]) if c is not None]
    plain = {name: value for name, value in call.options.items() if name != "contrast"}
    sized = replace(call.of(Tensor.double), options=plain)
    sized = replace(sized, v=[v.abs() for v in sized.v] if isinstance(sized.v, list) else sized.v.abs())
    sizes = attention(**sized.arguments, backend="reference")
    for beta in {abs(rule.beta) for rule in rules}:
        uniform = replace(sized, q=torch.zeros_like(sized.q))  # p = 1 / Nk
        means = attention(**uniform.arguments, backend="reference")
        sizes = torch.maximum(sizes, beta * sizes + abs(beta - 1) * means)
    return float(sizes.abs().max()) if sizes.numel() else 0.0


# Cases at their full size, by a sample of their rows


class ExpectedRows:
    """A sample of rows of a case, of all heads: float64 values and the eager form's.

    Args:
        case: inputs and shape.
        controlled: whether the case's control applies.
        inputs: q, k and v in float64 where the case's are already rounded results; None: the case's own.

    Attributes:
        rows: (sampled,) indices of the rows.
        exact: (batch, sampled, heads, dim) float64.
        eager: the same of the eager form.
        magnitude: the largest sum of absolute terms, see largest_term_sum.
    """

    def __init__(self, case: Case, controlled: bool, inputs: Tensors | None = None) -> None:
        shape, device, self.dtype = case.shape, case.q.device, case.dtype
        exact = (case.q, case.k, case.v) if inputs is None else inputs
        picks = sampled_rows(shape.rows)
        self.rows = torch.tensor([row for _, row in picks], device=device)
        lengths = {name: sum(segment == name for segment, _ in picks) for name in shape.rows}
        gain = eager_gain = derived_gain(shape, exact, controlled)
        if inputs is not None:
            eager_gain = derived_gain(shape, (case.q, case.k, case.v), controlled)
        found: list[Tensor] = []
        rounded: list[Tensor] = []
        self.magnitude = 0.0
        for h in range(shape.heads):
            call = _head_call(shape, exact, h, lengths, controlled, self.rows)
            found.append(gain[:, h, None, None, None] * exact_answer(call)[0])
            self.magnitude = max(self.magnitude, largest_term_sum(call))
            if inputs is not None:
                call = _head_call(shape, (case.q, case.k, case.v), h, lengths, controlled, self.rows)
            eager = eager_gain[:, h, None, None, None].float() * _eager(call, self.dtype)
            rounded.append(eager.to(self.dtype).double())
        self.exact, self.eager = torch.cat(found, 2), torch.cat(rounded, 2)

    def check(self, name: str, out: Tensor, slack: float = 2.0) -> dict[str, float]:
        """Errors of `out` (batch, rows, heads, dim), as `compare` reports them.

        Raises:
            WrongResult: as compare.
        """
        order = 8 * torch.finfo(torch.float32).eps * self.magnitude  # of float32 sums
        return compare(name, out, self.exact, self.eager, self.dtype, slack, order, self.rows)


class ExpectedGradients:
    """dq of a sample of rows, dk and dv of a sample of keys, float64, by autograd through the reference.

    The map is computed by chunks of rows, whose gradients of k and v add up. A derived gain counts as a
    constant.

    Args:
        case: inputs and shape; its control applies.
        grad: (batch, rows, heads, dim), the gradient of the output.
    """

    def __init__(self, case: Case, grad: Tensor) -> None:
        shape, self.dtype = case.shape, case.dtype
        tensors = (case.q, case.k, case.v)
        self.rows = torch.tensor([row for _, row in sampled_rows(shape.rows)], device=case.q.device)
        gain = derived_gain(shape, tensors, controlled=True)
        heads: list[Tensors] = []
        for h in range(shape.heads):
            q, k, v = (t[:, :, h : h + 1].double().requires_grad_() for t in tensors)
            dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
            for part in _chunks(slice(0, shape.n_rows), shape.n_keys):
                lengths = {name: _overlap(span, part) for name, span in spans(shape.rows).items()}
                q_part = q[:, part].detach().requires_grad_()
                call = _call(shape, (q_part, k, v), lengths, controlled=True)
                out = attention(**call.arguments, backend="reference")
                parts = torch.autograd.grad(
                    gain[:, h, None, None, None] * out, (q_part, k, v), grad[:, part, h : h + 1].double()
                )
                dq[:, part] = parts[0]
                dk, dv = dk + parts[1], dv + parts[2]
            heads.append((dq[:, self.rows], dk[:, self.rows], dv[:, self.rows]))
        self.dq, self.dk, self.dv = (torch.cat(ts, 2) for ts in zip(*heads, strict=True))

    def check(
        self, name: str, grads: tuple[Tensor, ...], bars: Mapping[str, float] | None
    ) -> dict[str, dict[str, float]]:
        """Max error and largest value of each gradient.

        Args:
            name: of the contestant.
            grads: dq, dk and dv, (batch, tokens, heads, dim).
            bars: by "q", "k", "v": another contestant's error as a share of the largest gradient. Allowed is
                twice that share plus 4 ulp; None: 5 %.

        Raises:
            WrongResult: a gradient is not finite, or off by more.
        """
        report: dict[str, dict[str, float]] = {}
        for what, grad, exact in zip("qkv", grads, (self.dq, self.dk, self.dv), strict=True):
            if not bool(torch.isfinite(grad).all()):
                raise WrongResult(f"{name}: the gradient of {what} has values that are not finite")
            largest = float(exact.abs().max())
            error = float((grad[:, self.rows].double() - exact).abs().max())
            bar = 0.05 if bars is None else 2 * bars[what] + 4 * torch.finfo(self.dtype).eps
            if not error <= bar * largest:  # a NaN must fail
                raise WrongResult(
                    f"{name}: the gradient of {what} is off by {error:.3g}, allowed {bar * largest:.3g}"
                )
            report[what] = {"max_error": error, "largest": largest}
        return report


def derived_gain(shape: Shape, tensors: Tensors, controlled: bool) -> Tensor:
    """(batch, heads) float64: the head gain of In-Context Brush, from a mass in float64; 1 without one.

    The mass is the reference's, one head and a chunk of rows at a time.
    """
    q, k, _ = tensors
    rule = shape.head_gain if controlled else None
    mass = torch.zeros(shape.batch, shape.heads, dtype=torch.float64, device=q.device)
    if rule is None:
        return mass + 1
    assert isinstance(rule.rows, str) and isinstance(rule.keys, str) and rule.norm == "minmax"
    column = list(shape.keys).index(rule.keys)
    bare = replace(shape, weight={})
    for h in range(shape.heads):
        for part in _chunks(spans(shape.rows)[rule.rows], shape.n_keys):
            head = (q[:, part, h : h + 1], k[:, :, h : h + 1], k[:, :, h : h + 1])
            call = _call(bare, head, {rule.rows: part.stop - part.start}, controlled=True)
            _, stats = exact_answer(call)
            mass[:, h] += stats.mass[:, 0, 0, column].double()
    return min_max_gain(mass / shape.rows[rule.rows], float(rule.span), float(rule.floor))


def _head_call(
    shape: Shape, tensors: Tensors, head: int, lengths: Lengths, controlled: bool, rows: Tensor
) -> FeatureCall:
    """One head's attention for some rows."""
    q, k, v = (t[:, :, head : head + 1] for t in tensors)
    return _call(shape, (q[:, rows], k, v), lengths, controlled)


def _call(shape: Shape, tensors: Tensors, lengths: Lengths, controlled: bool) -> FeatureCall:
    """The shape's control without its head gain, for q with the row segments `lengths`."""
    if not controlled:
        return FeatureCall(*tensors, {"all": tensors[0].shape[1]}, {"all": shape.n_keys})
    options: dict[str, Any] = {
        "weight": {pair: value for pair, value in shape.weight.items() if pair[0] in lengths},
        "groups": shape.groups,
        "gates": dict(shape.gates),
        "contrast": shape.contrast,
    }
    return FeatureCall(*tensors, lengths, shape.keys, options)


def sampled_rows(lengths: Mapping[str, int]) -> list[tuple[str, int]]:
    """(segment, row) of the first and the last row of every segment, and of one between."""
    starts = spans(lengths)
    return [
        (name, starts[name].start + i) for name, n in lengths.items() for i in sorted({0, n // 3, n - 1}) if n
    ]


def spans(lengths: Mapping[str, int]) -> dict[str, slice]:
    """The tokens of each segment."""
    ends = list(itertools.accumulate(lengths.values()))
    return {name: slice(end - n, end) for (name, n), end in zip(lengths.items(), ends, strict=True)}


def _overlap(a: slice, b: slice) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


def _chunks(rows: slice, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK // columns)
    return (slice(i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step))

"""The contestants: the vendor's attention, the papers' eager form, the composed baseline, our own kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bindings import Control, attention, backends
from . import eager
from .shapes import Shape

Call = Callable[[], Tensor]


class Missing(RuntimeError):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one shape; q, k and v are (batch, tokens, heads, dim), contiguous."""

    shape: Shape
    dtype: torch.dtype
    q: Tensor
    k: Tensor
    v: Tensor
    control: Control

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, heads, tokens, dim), contiguous: the layout that torch's kernels like best."""
        q, k, v = (t.transpose(1, 2).contiguous() for t in (self.q, self.k, self.v))
        return q, k, v


def draw(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Case:
    """Random inputs; heads differ in how they look at the first key segment, so that a head gain has work."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens: int) -> Tensor:
        return torch.randn(shape.batch, tokens, shape.heads, shape.dim, generator=generator)

    q, k, v = normal(shape.n_rows), normal(shape.n_keys), normal(shape.n_keys)
    first = next(iter(shape.keys.values()))
    towards = torch.ones(shape.dim) * shape.dim**-0.25  # adds scale * |towards|^2 = 1 to the logit
    q += towards
    k[:, :first] += torch.linspace(-1, 1, shape.heads)[:, None] * towards
    return Case(shape, dtype, q.to(dtype), k.to(dtype), v.to(dtype), shape.control())


@dataclass(frozen=True)
class Peer:
    """One contestant. prepare(case) does what is not timed and returns the call, or raises Missing.

    `slack` is how many times the eager form's error its result may have (see truth.py).
    """

    name: str
    title: str
    controlled: bool
    prepare: Callable[
        [Case], tuple[Call, bool]
    ]  # the call, and whether its result is (batch, heads, tokens, dim)
    slack: float = 2.0

    def start(self, case: Case) -> tuple[Call, Tensor]:
        """The timed call, and the result of a first one as (batch, tokens, heads, dim)."""
        call, heads_first = self.prepare(case)
        try:
            out = call()
        except ValueError as error:
            if str(error).startswith("backend:"):  # the backend exists and refuses this problem
                raise Missing(str(error)) from error
            raise
        return call, out.transpose(1, 2) if heads_first else out


def _sdpa(case: Case) -> tuple[Call, bool]:
    return functools.partial(F.scaled_dot_product_attention, *case.heads_first()), True


def _eager(case: Case) -> tuple[Call, bool]:
    shape = case.shape
    need = 3 * shape.batch * shape.heads * shape.n_rows * shape.n_keys * case.q.element_size()
    if need > (free := _available_memory()):
        raise Missing(f"its attention maps take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    q, k, v = case.heads_first()
    if shape.head_gain is not None:
        spans = [case.control.keys.slice(name) for name in ("prompt", "subject", "target")]
        return functools.partial(eager.in_context_brush, q, k, v, *spans), True
    by_word = [shape.weight[("image", word)] for word in shape.keys]
    weight = torch.tensor(
        list(
            itertools.chain.from_iterable([w] * n for w, n in zip(by_word, shape.keys.values(), strict=True))
        )
    )
    return functools.partial(eager.reweight, q, k, v, weight.to(case.dtype)), True


def _flashbrush(backend: str, controlled: bool, case: Case) -> tuple[Call, bool]:
    if reasons := backends()[backend]:
        raise Missing("; ".join(reasons))
    control = case.control if controlled else None
    return functools.partial(attention, case.q, case.k, case.v, control, backend=backend), False


def _flex(case: Case) -> tuple[Call, bool]:
    """FlexAttention, compiled; it has no place for a weight after the softmax: only the plain form runs."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)  # type: ignore[assignment]
    return functools.partial(compiled, *case.heads_first()), True


def _available_memory() -> float:
    try:
        with open("/proc/meminfo") as lines:
            kilobytes = {
                name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)
            }
        return 1024.0 * kilobytes["MemAvailable"]
    except (OSError, KeyError):
        return float("inf")


SDPA = Peer("sdpa", "torch SDPA", False, _sdpa)
EAGER = Peer(
    "eager", "eager, as the paper", True, _eager, slack=4.0
)  # it rounds the sums of each segment too
COMPOSED = Peer("composed", "composed", True, functools.partial(_flashbrush, "composed", True))
PLAIN = Peer("plain", "flashbrush cpu, plain", False, functools.partial(_flashbrush, "cpu", False))
CONTROLLED = Peer(
    "controlled", "flashbrush cpu, controlled", True, functools.partial(_flashbrush, "cpu", True)
)
FLEX = Peer("flex", "FlexAttention", False, _flex)

PEERS: dict[str, Peer] = {peer.name: peer for peer in (SDPA, EAGER, COMPOSED, PLAIN, CONTROLLED)}
OPTIONAL: dict[str, Peer] = {FLEX.name: FLEX}
GEMM_SIDES = (2048, 4096)


def gemm(side: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """(torch.mm of two side x side matrices, its flops): what this machine's own library reaches"""
    a, b = (torch.randn(side, side, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype)
    return functools.partial(torch.mm, a, b, out=out), 2 * side**3

"""The contestants: the vendor's attention, the papers' eager form, the composed baseline, our own kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bindings import Control, attention, backends
from ..cases.shapes import Shape
from . import eager

Call = Callable[..., Tensor]


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
        return self._heads_first

    @functools.cached_property
    def _heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2).contiguous() for t in (self.q, self.k, self.v))
        return q, k, v


def draw(shape: Shape, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu") -> Case:
    """Random inputs; heads differ in how they look at the first key segment, so that a head gain has work."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(tokens: int) -> Tensor:
        return torch.randn(shape.batch, tokens, shape.heads, shape.dim, generator=generator, device=device)

    q, k, v = normal(shape.n_rows), normal(shape.n_keys), normal(shape.n_keys)
    first = next(iter(shape.keys.values()))
    towards = (
        torch.ones(shape.dim, device=device) * shape.dim**-0.25
    )  # adds scale * |towards|^2 = 1 to the logit
    q += towards
    k[:, :first] += torch.linspace(-1, 1, shape.heads, device=device)[:, None] * towards
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
    if need > (free := _available_memory(case.q.device)):
        raise Missing(f"its attention maps take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    form = _eager_form(case)
    return functools.partial(form, *case.heads_first()), True


def _eager_form(case: Case) -> Call:
    """What the paper of the shape's method does, as a function of q, k and v (batch, heads, tokens, dim)."""
    shape = case.shape
    if shape.contrast is not None:
        if shape.weight or shape.head_gain is not None or shape.groups is not None:
            raise Missing("no paper's code has contrast and more")
        return functools.partial(eager.contrast, beta=shape.contrast.beta, clip=shape.contrast.clip)
    if shape.groups is not None:
        groups = [[case.control.keys.slice(name) for name in names] for names in shape.groups.values()]
        apart = any(a.stop != b.start for group in groups for a, b in itertools.pairwise(group))
        if shape.weight or shape.head_gain is not None or apart:
            raise Missing("no paper's code has groups and more")
        gates = [shape.gates.get(name, 1.0) for name in shape.groups]
        keys = [slice(group[0].start, group[-1].stop) for group in groups]
        return functools.partial(eager.decoupled, keys=keys, gates=gates)
    if shape.head_gain is not None:
        if shape.rows != shape.keys:
            raise Missing("the paper's code has as many rows as keys")
        spans = [case.control.keys.slice(name) for name in ("prompt", "subject", "target")]
        return functools.partial(eager.in_context_brush, prompt=spans[0], subject=spans[1], target=spans[2])
    if any(("image", word) not in shape.weight for word in shape.keys):
        raise Missing("no paper's code has these weights alone")
    by_word = [shape.weight[("image", word)] for word in shape.keys]
    weight = torch.tensor(
        list(
            itertools.chain.from_iterable([w] * n for w, n in zip(by_word, shape.keys.values(), strict=True))
        )
    )
    return functools.partial(eager.reweight, weight=weight.to(case.q))


def ours(backend: str, controlled: bool, case: Case) -> tuple[Call, bool]:
    """A call of our library on a backend."""
    if reasons := backends()[backend]:
        raise Missing("; ".join(reasons))
    control = case.control if controlled else None
    return functools.partial(attention, case.q, case.k, case.v, control, backend=backend), False


def _flex(case: Case) -> tuple[Call, bool]:
    """FlexAttention, compiled; it has no place for a weight after the softmax: only the plain form runs."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)  # type: ignore[assignment]
    return functools.partial(compiled, *case.heads_first()), True


def _available_memory(device: torch.device) -> float:
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
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
COMPOSED = Peer("composed", "composed", True, functools.partial(ours, "composed", True))
PLAIN = Peer("plain", "flashbrush cpu, plain", False, functools.partial(ours, "cpu", False))
CONTROLLED = Peer("controlled", "flashbrush cpu, controlled", True, functools.partial(ours, "cpu", True))
FLEX = Peer("flex", "FlexAttention", False, _flex)

PEERS: dict[str, Peer] = {peer.name: peer for peer in (SDPA, EAGER, COMPOSED, PLAIN, CONTROLLED)}
OPTIONAL: dict[str, Peer] = {FLEX.name: FLEX}
GEMM_SIDES = (2048, 4096)


def gemm(side: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """(torch.mm of two side x side matrices, its flops): what this machine's own library reaches"""
    a, b = (torch.randn(side, side, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype)
    return functools.partial(torch.mm, a, b, out=out), 2 * side**3

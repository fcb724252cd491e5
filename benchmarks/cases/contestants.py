"""The contestants: torch's attention, the papers' eager forms, our composed baseline and our kernels."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bindings import attention, backends
from . import eager_forms
from .inputs import Case

Call = Callable[..., Tensor]


class Missing(RuntimeError):
    """A contestant cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    Attributes:
        name: in the results.
        title: in messages.
        controlled: whether it applies the case's control.
        prepare: does the untimed work for a case and returns the call to time, and whether the call's result
            is (batch, heads, tokens, dim) rather than (batch, tokens, heads, dim). Raises Missing where the
            contestant cannot run.
        slack: how many times the allowed error its result may have, see float64_check.compare.
    """

    name: str
    title: str
    controlled: bool
    prepare: Callable[[Case], tuple[Call, bool]]
    slack: float = 2.0

    def start(self, case: Case) -> tuple[Call, Tensor]:
        """The call to time, and the result of a first one as (batch, tokens, heads, dim).

        Raises:
            Missing: it cannot run, or our backend refuses the case.
        """
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
        raise Missing(f"its attention maps need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    form = _eager_form(case)
    return functools.partial(form, *case.heads_first()), True


def _eager_form(case: Case) -> Call:
    """The shape's control as its paper computes it: a function of q, k and v (batch, heads, tokens, dim)."""
    shape = case.shape
    if shape.contrast is not None:
        if shape.weight or shape.head_gain is not None or shape.groups is not None:
            raise Missing("no paper's code combines contrast with other controls")
        return functools.partial(eager_forms.contrast, beta=shape.contrast.beta, clip=shape.contrast.clip)
    if shape.groups is not None:
        groups = [[case.control.keys.slice(name) for name in names] for names in shape.groups.values()]
        apart = any(a.stop != b.start for group in groups for a, b in itertools.pairwise(group))
        if shape.weight or shape.head_gain is not None or apart:
            raise Missing("no paper's code combines groups with other controls")
        gates = [shape.gates.get(name, 1.0) for name in shape.groups]
        keys = [slice(group[0].start, group[-1].stop) for group in groups]
        return functools.partial(eager_forms.decoupled, keys=keys, gates=gates)
    if shape.head_gain is not None:
        if shape.rows != shape.keys:
            raise Missing("the paper's code needs as many rows as keys")
        spans = [case.control.keys.slice(name) for name in ("prompt", "subject", "target")]
        return functools.partial(
            eager_forms.in_context_brush, prompt=spans[0], subject=spans[1], target=spans[2]
        )
    if any(("image", word) not in shape.weight for word in shape.keys):
        raise Missing("no paper's code has these weights alone")
    by_word = torch.tensor([shape.weight[("image", word)] for word in shape.keys])
    weight = by_word.repeat_interleave(torch.tensor(list(shape.keys.values())))  # (keys,)
    return functools.partial(eager_forms.reweight, weight=weight.to(case.q))


def ours(backend: str, controlled: bool, case: Case) -> tuple[Call, bool]:
    """A call of flashbrush.attention on a named backend."""
    if reasons := backends()[backend]:
        raise Missing("; ".join(reasons))
    control = case.control if controlled else None
    return functools.partial(attention, case.q, case.k, case.v, control, backend=backend), False


def missing_for_layers() -> list[str]:
    """Why a layer of a diffusers model cannot be measured on the cpu backend; empty where it can."""
    if importlib.util.find_spec("diffusers") is None:
        return ["diffusers is not installed"]
    return backends()["cpu"]


def _flex(case: Case) -> tuple[Call, bool]:
    """FlexAttention, compiled. Plain only: it has no hook for a weight after the softmax."""
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


SDPA = Contestant("sdpa", "torch SDPA", False, _sdpa)
# Twice the usual slack: it also rounds the partial sum of each segment.
EAGER = Contestant("eager", "eager, as the paper", True, _eager, slack=4.0)
COMPOSED = Contestant("composed", "composed", True, functools.partial(ours, "composed", True))
PLAIN = Contestant("plain", "flashbrush cpu, plain", False, functools.partial(ours, "cpu", False))
CONTROLLED = Contestant(
    "controlled", "flashbrush cpu, controlled", True, functools.partial(ours, "cpu", True)
)
FLEX = Contestant("flex", "FlexAttention", False, _flex)

CONTESTANTS: dict[str, Contestant] = {c.name: c for c in (SDPA, EAGER, COMPOSED, PLAIN, CONTROLLED)}
OPTIONAL: dict[str, Contestant] = {FLEX.name: FLEX}
# Its name in version 0.1, for files given to `benchmarks/gpu/run.py --peers`; removed in the next release.
Peer = Contestant


def gemm(side: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """(torch.mm of two side x side matrices, its floating-point operations)."""
    a, b = (torch.randn(side, side, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype)
    return functools.partial(torch.mm, a, b, out=out), 2 * side**3

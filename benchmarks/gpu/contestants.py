"""The contestants on a GPU: every installed plain attention, composed and eager forms, and our own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases.contestants import COMPOSED, EAGER as CPU_EAGER, SDPA, Call, Contestant, Missing, ours
from ..cases.eager_forms import min_max_gain
from ..cases.inputs import Case
from .controls import CUDA, OURS
from .setup import NO_CUDA, Setup

FORCED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
UNAVAILABLE = ("No available kernel", "No viable backend")  # in torch's error where it cannot force a backend


def forced(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on one of torch's backends; q, k, v and the result are (batch, heads, tokens, dim).

    Raises:
        Missing: the backend does not support this call here.
    """
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:
        if any(words in str(error) for words in UNAVAILABLE):
            raise Missing(f"torch has no {backend.name} kernel for this call here") from error
        raise


def _forced(backend: SDPBackend, case: Case) -> tuple[Call, bool]:
    if case.q.device.type != "cuda" and backend is not SDPBackend.FLASH_ATTENTION:
        raise Missing(f"torch has no {backend.name} kernel on the CPU")
    return functools.partial(forced, backend, *case.heads_first()), True


def _flash_attn_2() -> Any:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    return flash_attn_func


def _flash_attn_3() -> Any:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    return flash_attn_func


def _flash_attn_4() -> Any:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    return flash_attn_func


def _xformers() -> Any:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    return memory_efficient_attention


def _tokens_first(load: Callable[[], Any], case: Case) -> tuple[Call, bool]:
    """Another library's attention of (batch, tokens, heads, dim); a tuple's first entry is the output."""
    try:
        attend = load()
    except ModuleNotFoundError as error:
        raise Missing(f"{error.name} is not installed") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise Missing(f"it is installed but does not load: {error}") from error
    if case.q.device.type != "cuda":
        raise Missing("it has no attention on the CPU")

    def call() -> Tensor:
        out = attend(case.q, case.k, case.v)
        return out[0] if isinstance(out, tuple) else out

    return call, False


def _flex(case: Case) -> tuple[Call, bool]:
    """FlexAttention, compiled. Plain only: it has no hook for a weight after the softmax."""
    from torch.nn.attention.flex_attention import flex_attention

    if case.q.device.type != "cuda":
        warnings.filterwarnings("ignore", message="flex_attention called without")
        return functools.partial(flex_attention, *case.heads_first()), True  # type: ignore[return-value]
    attend: Any = torch.compile(flex_attention, dynamic=False)
    return functools.partial(attend, *case.heads_first()), True


VENDORS: dict[str, Contestant] = {
    "sdpa": Contestant("sdpa", "torch SDPA, its own choice", False, SDPA.prepare),
    **{
        n: Contestant(n, f"torch SDPA, {n} forced", False, functools.partial(_forced, b))
        for n, b in FORCED.items()
    },
    **{
        name: Contestant(name, title, False, functools.partial(_tokens_first, load))
        for name, title, load in (
            ("flash_attn_2", "flash-attn", _flash_attn_2),
            ("flash_attn_3", "FlashAttention-3", _flash_attn_3),
            ("flash_attn_4", "FlashAttention-4", _flash_attn_4),
            ("xformers", "xFormers", _xformers),
        )
    },
}
EAGER = replace(CPU_EAGER, slack=16.0)  # on a GPU it rounds the logits and every partial sum to bfloat16
FLEX = Contestant("flex", "FlexAttention", False, _flex)


def ours_named(setup: Setup, name: str) -> Contestant:
    """Our call by its name in the results, see controls.OURS: on the setup's backend, or on cuda."""
    backend, control = "cuda" if name in CUDA else setup.backend, OURS[name]
    controlled = control != "plain"
    title = f"flashbrush {backend}, {control}"
    left_out = name in CUDA and not setup.cuda
    return Contestant(
        name, title, controlled, _left_out if left_out else functools.partial(ours, backend, controlled)
    )


def _left_out(case: Case) -> NoReturn:
    raise Missing(NO_CUDA)


def composed_forms() -> dict[str, Contestant]:
    """Forms without a kernel of their own: a vendor's attention with LSE per key segment, merged.

    `composed` is our backend of that name. The others are written out here, one per vendor, with a merge
    compiled by torch.
    """
    forms = {
        n: Contestant(
            f"composed_{n}", f"composed on {n}, compiled merge", True, functools.partial(_composed, n)
        )
        for n in LSE
    }
    return {"composed": COMPOSED, **{form.name: form for form in forms.values()}}


def _cudnn_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.reshape(q.shape[:3])


def _flash_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse


LSE: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "cudnn": _cudnn_lse,
    "flash": _flash_lse,
}


def _composed(vendor: str, case: Case) -> tuple[Call, bool]:
    shape = case.shape
    cuda = case.q.device.type == "cuda"
    if not cuda and vendor != "flash":
        raise Missing(f"{vendor} has no attention on the CPU")
    if shape.groups is not None or shape.contrast is not None or shape.rows != shape.keys:
        raise Missing("this form is written for weights and a head gain alone")
    q, k, v = case.heads_first()
    parts = [(k[:, :, s], v[:, :, s]) for s in (case.control.keys.slice(name) for name in shape.keys)]
    target, prompt = case.control.rows.slice("target"), list(shape.keys).index("prompt")
    rows = torch.zeros(len(parts), shape.n_rows, dtype=torch.float32)
    for c, key in enumerate(shape.keys):
        rows[c] = torch.cat(
            [torch.full((n,), shape.weight.get((r, key), 1.0)) for r, n in shape.rows.items()]
        )
    weight, gain = rows.to(case.q.device), shape.head_gain

    def merge(outs: list[Tensor], lses: list[Tensor]) -> Tensor:
        lse = torch.stack(lses).float()  # (segments, batch, heads, rows)
        share = torch.exp(lse - torch.logsumexp(lse, 0))
        merged = sum((s * w)[..., None] * o.float() for s, w, o in zip(share, weight, outs, strict=True))
        assert isinstance(merged, Tensor)
        if gain is not None:
            mass = share[prompt, :, :, target].mean(-1)  # (batch, heads)
            merged = merged * min_max_gain(mass, float(gain.span), float(gain.floor))[:, :, None, None]
        return merged.to(outs[0].dtype)

    join: Any = torch.compile(merge, dynamic=False) if cuda else merge
    attend = LSE[vendor]

    def call() -> Tensor:
        found = [attend(q, keys, values) for keys, values in parts]
        return join([o for o, _ in found], [s for _, s in found])

    return call, True

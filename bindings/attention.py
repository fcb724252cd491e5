"""attention(): segment-controlled attention, and the plain accelerated call."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .backends.planner import check_name, resolve
from .core.autograd import first_order, refuse_tangents
from .core.control import Control
from .core.dispatcher_bypass import can_skip_dispatcher
from .core.lowering import Keys, Source, lower
from .core.problem import pack, position
from .operators import attention as operators


class Stats(NamedTuple):
    """Statistics of one attention call, float32 (float64 for float64). None of them is differentiable.

    Attributes:
        lse: (batch, heads, rows, groups), natural log; -inf where a row has no allowed key.
        mass: (batch, heads, row segments, key segments): the sum of p over a pair of segments, before weight,
            gate, contrast and gain.
        gain: (batch, heads, row segments): the gain that was applied, given times derived.
    """

    lse: Tensor
    mass: Tensor
    gain: Tensor


@overload
def attention(
    q: Tensor,
    k: Keys,
    v: Keys,
    control: Control | None = None,
    *,
    scale: float | Tensor | None = None,
    source: Source | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Keys,
    v: Keys,
    control: Control | None = None,
    *,
    scale: float | Tensor | None = None,
    source: Source | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    return_stats: Literal[True],
) -> tuple[Tensor, Stats]: ...
def attention(
    q: Tensor,
    k: Keys,
    v: Keys,
    control: Control | None = None,
    *,
    scale: float | Tensor | None = None,
    source: Source | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Attention over segments of tokens, changed as a Control says. Without a control: plain softmax(QK^T)V.

    With a(i) the row's segment, c(j) the key's segment, and phi the contrast:

        s_ij = scale * <q_i, k_j> + bias[h, a(i), c(j)]
        p_ij = softmax over the keys of group(c(j))
        o_i  = gain[h, a(i)] * sum_g gate_g(i) * sum_{c in g} weight[h, a(i), c] * sum_{j in c} phi(p_ij) v_j

    Gradients flow to q, k and v. A derived head gain counts as a constant.

    Args:
        q: (batch, rows, heads, dim), float32, bfloat16 or float16, dim up to 256; float64 on the backends
            reference and composed. Under torch.autocast q, k and v are cast to its dtype, float64 excepted.
        k: (batch, keys, kv_heads, dim), or a list with one such tensor per key segment, read in place. heads
            is a multiple of kv_heads; a batch of 1 broadcasts; a tensor may appear twice.
        v: as k.
        control: what to change, as tables over row and key segments. None: nothing.
        scale: logit scale: a number, or a tensor (batch,) or (batch, heads). None: 1/sqrt(dim).
        source: {"q": index, "k": index, "v": index}, int tensors (out_batch,): output item n reads
            q[index[n]] and so on. For k and v also one tensor per list entry.
        mask: bool (True: attend) or additive float, broadcastable to (batch, heads, rows, keys). Only on the
            backends composed and reference.
        backend: "auto", or a name of backends(). A named one raises with its reasons rather than fall back.
        out: where to write the output: (batch, rows, heads, dim) of q's dtype, not overlapping q, k or v. Not
            with tensors that require grad.
        return_stats: also return Stats.

    Returns:
        The output (batch, rows, heads, dim) in q's dtype, or (output, Stats). A row without an allowed key in
        a group gives 0 there, with lse -inf and mass 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Nothing has been
            computed.
        NotImplementedError: a forward-mode derivative.
        RuntimeError: a gradient of a gradient, when it is asked for; backend="reference" has one.

    Examples:
        >>> import torch, flashbrush as fb
        >>> q, k, v = torch.randn(3, 1, 48, 2, 16)
        >>> segments = fb.Segments(prompt=8, subject=20, target=20)
        >>> control = fb.Control(segments, weight={("target", "prompt"): 1.3})
        >>> out, stats = fb.attention(q, k, v, control, return_stats=True)
        >>> out.shape, stats.mass.shape
        (torch.Size([1, 48, 2, 16]), torch.Size([1, 2, 3, 3]))
    """
    problem = lower(q, k, v, control, scale, source, mask, out)
    check_name(backend)
    tensors = (problem.q, *problem.k, *problem.v)
    refuse_tangents(*tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        if out is not None:
            raise ValueError("out: not with tensors that require grad")
        if backend == "reference":
            result = resolve("attention", backend, problem.q.device, problem)(problem)
            stats = (result.lse, result.mass.detach(), result.gain.detach())
            return (result.out, Stats(*stats)) if return_stats else result.out
        if any(c is not None for c in problem.contrast):
            raise TypeError("contrast: has a gradient only on backend='reference'")
        output, *stats = _Attention.apply(pack(problem)[_FIRST_REST:], backend, len(problem.k), *tensors)
        return (output, Stats(*stats)) if return_stats else output
    if can_skip_dispatcher(*tensors, scale if isinstance(scale, Tensor) else None, mask, out):
        if return_stats or out is not None:
            problem = problem.changed(need_stats=return_stats, out=out)
        result = operators.solve(problem, backend)
        output = result.out.contiguous() if out is None else out
        stats = operators.stats(problem, result) if return_stats else ()
    elif out is not None:
        output, stats = out, operators.attention_out(*pack(problem), return_stats, backend, out)
    else:
        output, *stats = operators.attention(*pack(problem), return_stats, backend)
    if out is not None and not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(
            out
        )  # backends write to its address, which autograd does not see
    return (output, Stats(*stats)) if return_stats else output


_FIRST_REST = 3  # of the packed inputs: those after q, k and v
# Tensors of the caller, which may change before the backward pass; the tables belong to the control.
_CALLERS = tuple(position(name) - _FIRST_REST for name in ("scales", "mask"))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rest, backend, n_keys, *tensors):  # type: ignore[override]
        q, k, v = tensors[0], list(tensors[1 : 1 + n_keys]), list(tensors[1 + n_keys :])
        out, lse, mass, gain = operators.attention(q, k, v, *rest, True, backend)
        ctx.callers = [i for i in _CALLERS if rest[i] is not None]
        ctx.save_for_backward(out, lse, gain, *tensors, *(rest[i] for i in ctx.callers))
        ctx.rest = [None if i in ctx.callers else x for i, x in enumerate(rest)]
        ctx.n_keys, ctx.backend = n_keys, backend
        ctx.mark_non_differentiable(lse, mass, gain)
        return out, lse, mass, gain

    @staticmethod
    @first_order
    def backward(ctx, dout, *_):  # type: ignore[override]
        out, lse, gain, q, *kv = ctx.saved_tensors
        k, v, callers = kv[: ctx.n_keys], kv[ctx.n_keys : 2 * ctx.n_keys], kv[2 * ctx.n_keys :]
        rest = list(ctx.rest)
        for i, t in zip(ctx.callers, callers, strict=True):
            rest[i] = t
        dq, dk, dv = operators.attention_backward(dout, out, lse, gain, q, k, v, *rest, ctx.backend)
        return None, None, None, dq, *dk, *dv

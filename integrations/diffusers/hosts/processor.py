"""The base class of every host's processor: project each stream of tokens, then call attend().

An author of a host writes `__call__` only; flux.py is the one to copy. What a plan does to q, k and v is
protocol/plan_call.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ....bindings import attention, qk_norm_rope
from ..protocol.plan import Plan
from ..protocol.plan_call import CallState, CallStats, PlanCall, same_shape

Rope = tuple[Tensor, Tensor]  # cos and sin, each (tokens, head_dim)


class Stream(NamedTuple):
    """q, k and v of one kind of tokens (text, image), each (batch, tokens, heads, head_dim), as projected.

    Attributes:
        query: None for tokens that are attended to and do not attend.
        norm_q: the norm of q over head_dim; None: none.
        norm_k: the norm of k over head_dim; None: none.
    """

    query: Tensor | None
    key: Tensor
    value: Tensor
    norm_q: nn.Module | None = None
    norm_k: nn.Module | None = None


class ControlledProcessor:
    """A diffusers attention processor whose attention follows a plan. It has no weights and no state_dict.

    A compiled block reads only tensors and static structure from it. What differs between layers of a kind,
    such as index and name, is kept elsewhere, so that they share one compilation.

    Args:
        plan: what to do in each call, until the handle sets another; None: plain attention.
        backend: as in attention().
        collect: keep the Stats of controlled calls in `stats`.

    Attributes:
        state: what the next call does; None: the model has a method, which was not asked for a plan yet.
        stats: (batch items or None for all, Stats) of each controlled call since the handle last took them.
        original: once the control is removed, the stock processor that this one replaced.
        dispatches: whether the stock processor calls diffusers' dispatcher. Where it does not, a call with a
            mask ignores the attention backend that is set.
    """

    # diffusers configures a processor through these two.
    _attention_backend = None
    _parallel_config = None
    dispatches = True

    def __init__(self, plan: Plan | None = None, *, backend: str = "auto", collect: bool = False) -> None:
        self.backend = backend
        self.state: CallState | None = CallState(plan, collect=collect)
        self.stats: tuple[CallStats, ...] = ()
        self.original: Any = None

    def replace(self, attn: Any, original: Any) -> None:
        """Take over the settings of the processor in place.

        Raises:
            TypeError: this processor cannot replace that one in this layer.
        """
        if (backend := getattr(original, "_attention_backend", None)) is not None:
            self._attention_backend = backend

    def retire(self, original: Any) -> None:
        """From now on attend as the unchanged model does, in case this processor is put back into a model."""
        if hasattr(original, "_attention_backend"):
            original._attention_backend = self._attention_backend
        self.state, self.original = CallState(stock=True), original

    def hidden(self, x: Tensor) -> Tensor:
        """The image's hidden states as the plan maps them. Call it first, before the projections.

        Args:
            x: (batch, image tokens, channels); in a layer whose tokens are joined already (batch, [text ;
                image] tokens, channels).
        """
        state = self.state
        if state is None:
            return x
        if callable(state.plan):
            state.plan = state.plan()
        if state.plan is None or state.plan.hidden is None:
            return x
        return same_shape("Plan.hidden", state.plan.hidden(x), x)

    def attend(
        self,
        streams: Sequence[Stream],
        heads: int,
        *,
        rope: Rope | None = None,
        mask: Tensor | None = None,
        cross: bool = False,
    ) -> Tensor:
        """Attention of the joined streams, (batch, rows, heads * head_dim), rows in the order of the streams.

        Norms of q and k, the plan's offsets, RoPE, and attention as the plan says.

        Args:
            streams: text first, then image, whatever the model's own order of outputs.
            heads: heads of the layer on all tensor-parallel ranks together.
            rope: of all tokens, in the order of the streams.
            mask: diffusers' attention_mask, broadcastable to (batch, heads, rows, keys).
            cross: whether keys are other tokens than rows.

        Raises:
            NotImplementedError: context parallelism; a derived gain with heads spread over ranks; a mask with
                a plan that cannot take one.
            RuntimeError: the method has not been asked for a plan.
            ValueError: a transform changed a shape.
        """
        state = self._checked_state(streams[0].value.shape[0])
        plan: Any = state.plan  # hidden() has replaced a function by the Plan that it returns
        q_offset, k_offset = (None, None) if plan is None else (plan.q_offset, plan.k_offset)
        query = join([(s.query, s.norm_q) for s in streams if s.query is not None], q_offset, rope)
        key = join([(s.key, s.norm_k) for s in streams], k_offset, rope)
        values = [s.value for s in streams]
        value = torch.cat(values, 1) if len(values) > 1 else values[0]
        dtype = query.dtype
        if dtype != value.dtype:  # autocast leaves the outputs of norms in float32
            query, key = query.to(value.dtype), key.to(value.dtype)
        if plan is None:
            out = self._plain(query, key, value, mask)
        else:
            self._check_head_gain(plan, query.shape[2], heads)
            call = PlanCall(
                plan,
                backend=self.backend,
                collect=state.collect and not state.again,
                again=state.again,
                plain=self._plain if state.stock or self._attention_backend is not None else None,
            )
            out = call.attend(query, key, value, mask=mask, cross=cross)
            self.stats = call.stats
        return out.flatten(2, 3).to(dtype)

    def _checked_state(self, batch: int) -> CallState:
        if self._parallel_config is not None:
            raise NotImplementedError(
                "flashbrush: context parallelism is configured, but a processor has only its rank's tokens; "
                "disable it, or call handle.remove()"
            )
        if self.state is None:
            raise RuntimeError(
                "flashbrush: the method has not been asked for a plan, because the model was compiled "
                "together with its forward pre-hook; call handle.prepare() with the sizes of the call "
                "first, and handle.set_step() before each step"
            )
        if self.state.batch not in (None, batch):
            raise RuntimeError(
                f"flashbrush: handle.prepare() planned for a batch of {self.state.batch}, the call has "
                f"{batch}; call it again with this batch"
            )
        return self.state

    def _check_head_gain(self, plan: Plan, mine: int, heads: int) -> None:
        if mine != heads and any(control.head_gain is not None for control in plan.controls):
            raise NotImplementedError(
                f"flashbrush: a derived head gain compares all {heads} heads, but tensor parallelism leaves "
                f"{mine} on this rank; use a method without one"
            )

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        stock = self.state is not None and self.state.stock
        # flashbrush has no fused path for a dense mask: the stock call is the fastest.
        if stock or self._attention_backend is not None or mask is not None:
            backend: Any = self._attention_backend if mask is None or self.dispatches else "native"
            return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)
        return attention(query, key, value, backend=self.backend)


def join(streams: list[tuple[Tensor, nn.Module | None]], offset: Tensor | None, rope: Rope | None) -> Tensor:
    """q or k of all streams, (batch, all tokens, heads, dim): normalised, joined, offset added, rotated.

    Args:
        streams: [(x (batch, tokens, heads, dim), its norm over dim or None), ...].
        offset: broadcastable to (batch, all tokens, heads, dim).
        rope: cos and sin (all tokens, dim) of interleaved RoPE, as FLUX has it.
    """
    if len(streams) == 1 and streams[0][1] is None and offset is None and rope is None:
        return streams[0][0]
    cos, sin = (None, None) if rope is None else rope
    parts, start, total, eps = [], 0, sum(x.shape[1] for x, _ in streams), None
    for x, norm in streams:
        weight = None
        if norm is not None and _is_plain(norm, x) and eps in (None, _eps(norm, x)):
            weight, eps = norm.weight, _eps(norm, x)
        elif norm is not None:
            x = norm(x)
        mine = offset
        if offset is not None and offset.dim() >= 3 and offset.shape[-3] == total:
            mine = offset[..., start : start + x.shape[1], :, :]
        start += x.shape[1]
        parts.append((x, weight, None if mine is None else mine.to(x)))
    return qk_norm_rope(parts, cos, sin, eps=eps or 0.0)


def _is_plain(norm: nn.Module, x: Tensor) -> bool:
    """Whether qk_norm_rope can compute the norm.

    It must be an RMSNorm without hooks (offloading adds some), without a replaced forward and without a bias,
    and its weight must have x's dtype and device.
    """
    if type(norm) not in (nn.RMSNorm, RMSNorm) or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    if norm.weight is None or getattr(norm, "bias", None) is not None:
        return False
    return "forward" not in norm.__dict__ and norm.weight.dtype == x.dtype and norm.weight.device == x.device


def _eps(norm: nn.Module, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else float(norm.eps)  # type: ignore[arg-type]

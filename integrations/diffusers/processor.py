"""What every architecture's processor shares: a plan turned into one call of flashbrush.attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ...bindings import Stats, attention, qk_norm_rope
from .plan import Plan


class ControlledProcessor:
    """Holds the plan of the coming call. A plain object: no weights, nothing in a state_dict.

    A compiled block reads from it only tensors and static structure; what differs from layer to layer (index, name)
    stays with the handle, so that all blocks of a kind share one compilation.

    Args:
        plan: what to do; None: plain attention.
        backend: as in attention().
        collect: leave the Stats of a controlled call in `stats`.
    """

    # The two attributes through which diffusers configures a processor.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, plan: Plan | None = None, *, backend: str = "auto", collect: bool = False) -> None:
        self.plan = plan
        self.backend = backend
        self.collect = collect
        self.planned = True  # False: a method is in charge and has not been asked yet
        self.defer = False  # plain calls go to diffusers' dispatcher, unchanged
        self.stats: Stats | None = None

    def attend(self, query: Tensor, key: Tensor, values: list[Tensor], mask: Tensor | None, heads: int) -> Tensor:
        """The plan's attention; q, k and the result (batch, tokens, heads on this rank, dim).

        Args:
            values: v of each stream, in the order in which q and k are joined.
            mask: the attention_mask of diffusers, broadcastable to (batch, heads, tokens, tokens).
            heads: heads of the layer on all ranks together.

        Raises:
            NotImplementedError: context parallelism; a derived gain where heads are spread over ranks; a mask with
                extra keys. RuntimeError: the method has not been asked. ValueError: a transform changed a shape.
        """
        if self._parallel_config is not None:
            raise NotImplementedError(
                "flashbrush: context parallelism is configured, but a processor sees only its rank's tokens; "
                "disable it, or remove() the control"
            )
        if not self.planned:
            raise RuntimeError(
                "flashbrush: the method has not been asked for a plan, because the model's forward pre-hook did not run "
                "outside of the compiled region; call handle.prepare(text_len=, image_len=, batch=) before the model"
            )
        value = torch.cat(values, 1) if len(values) > 1 else values[0]
        if query.dtype != value.dtype:
            # Autocast may leave the norms' outputs in float32.
            query, key = query.to(value.dtype), key.to(value.dtype)
        plan = self.plan
        if plan is None:
            # A dense mask has no fused path here: the stock call is the fastest one.
            if self.defer or self._attention_backend is not None or mask is not None:
                return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
            return attention(query, key, value, backend=self.backend)
        if plan.query is not None:
            query = _same_shape("query", plan.query(query), query)
        if plan.value is not None:
            value = _same_shape("value", plan.value(value), value)
        control = plan.control
        if control is not None and control.head_gain is not None and query.shape[2] != heads:
            raise NotImplementedError(
                f"flashbrush: a derived head gain compares all {heads} heads, but tensor parallelism leaves "
                f"{query.shape[2]} on this rank; use a method without one"
            )
        keys: Tensor | Sequence[Tensor] = key
        joined: Tensor | Sequence[Tensor] = value
        source = plan.source
        if plan.extra:
            if mask is not None:
                raise NotImplementedError("flashbrush: attention_mask together with a plan's extra keys")
            keys, joined, source = _segment_lists(plan, key, value)
        if not self.collect or control is None:
            return attention(query, keys, joined, control, source=source, mask=mask, backend=self.backend)
        out, self.stats = attention(
            query, keys, joined, control, source=source, mask=mask, backend=self.backend, return_stats=True
        )
        return out


def join(streams: list[tuple[Tensor, nn.Module]], offset: Tensor | None, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """q or k of the streams: normalised, joined, with the plan's offset, rotated by FLUX's interleaved RoPE.

    Args:
        streams: [(x (batch, tokens, heads, dim), its norm), ...].
        offset: broadcastable to (batch, all tokens, heads, dim).
        rope: cos and sin (all tokens, dim), or None.
    """
    cos, sin = (None, None) if rope is None else rope
    parts, start, total, eps = [], 0, sum(x.shape[1] for x, _ in streams), None
    for x, norm in streams:
        weight = None
        if _is_plain(norm, x) and eps in (None, _eps(norm, x)):
            weight, eps = norm.weight, _eps(norm, x)
        else:
            x = norm(x)
        mine = offset
        if offset is not None and offset.dim() >= 3 and offset.shape[-3] == total:
            mine = offset[..., start : start + x.shape[1], :, :]
        start += x.shape[1]
        parts.append((x, weight, None if mine is None else mine.to(x)))
    return qk_norm_rope(parts, cos, sin, eps=eps or 0.0)


def _is_plain(norm: nn.Module, x: Tensor) -> bool:
    """Whether the norm is nothing but RMSNorm: no hooks (offloading), no other forward, weights and x of one dtype."""
    if type(norm) is not nn.RMSNorm or norm.weight is None or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    return "forward" not in norm.__dict__ and norm.weight.dtype == x.dtype and norm.weight.device == x.device


def _eps(norm: nn.Module, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else float(norm.eps)  # type: ignore[arg-type]


def _same_shape(name: str, result: Tensor, given: Tensor) -> Tensor:
    if result.shape != given.shape:
        raise ValueError(f"Plan.{name}: expected a tensor of shape {tuple(given.shape)}, got {tuple(result.shape)}")
    return result


def _segment_lists(plan: Plan, key: Tensor, value: Tensor):
    """One tensor per key segment, views of the layer's own and the plan's extra ones; and the source to match.

    The source's indices are those of the layer's own items; extra keys belong to the output item, or to all.
    """
    assert plan.control is not None and plan.extra is not None
    keys, values, own, start = [], [], [], 0
    segments = plan.control.keys
    for name, length in zip(segments.names, segments.lengths, strict=True):
        if name in plan.extra:
            extra_key, extra_value = plan.extra[name]
            keys.append(extra_key)
            values.append(extra_value)
            own.append(False)
        else:
            keys.append(key[:, start : start + length])
            values.append(value[:, start : start + length])
            own.append(True)
            start += length
    if plan.source is None:
        return keys, values, None
    source = {n: index if n == "q" else [index if mine else None for mine in own] for n, index in plan.source.items()}
    return keys, values, source

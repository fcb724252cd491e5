"""What every architecture's processor shares: a plan turned into calls of flashbrush.attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ...bindings import Control, Stats, attention, qk_norm_rope
from .plan import Part, Plan


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
    # Whether the stock processors call diffusers' dispatcher; those that do not take a mask whatever backend is set.
    dispatches = True

    def __init__(self, plan: Plan | None = None, *, backend: str = "auto", collect: bool = False) -> None:
        self.plan = plan
        self.backend = backend
        self.collect = collect
        self.planned = True  # False: a method is in charge and has not been asked yet
        self.defer = False  # plain calls go to diffusers' dispatcher, unchanged
        # (the items of the batch, None: all; their Stats) of each controlled call
        self.stats: tuple[tuple[tuple[int, ...] | None, Stats], ...] = ()

    def replace(self, attn: Any, original: Any) -> None:
        """Take over what the processor in place decides; TypeError where this one is no drop-in for it after all."""
        if (backend := getattr(original, "_attention_backend", None)) is not None:
            self._attention_backend = backend

    def attend(self, query: Tensor, key: Tensor, values: list[Tensor], mask: Tensor | None, heads: int) -> Tensor:
        """The plan's attention; q, k and the result (batch, tokens, heads on this rank, dim).

        Args:
            values: v of each stream, in the order in which k is joined.
            mask: the attention_mask of diffusers, broadcastable to (batch, heads, rows, keys).
            heads: heads of the layer on all ranks together.

        Raises:
            NotImplementedError: context parallelism; a derived gain where heads are spread over ranks; a mask with
                extra keys, parts or an order. RuntimeError: the method has not been asked. ValueError: a transform changed a
                shape.
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
            return self._plain(query, key, value, mask)
        if plan.query is not None:
            query = _same_shape("query", plan.query(query), query)
        if plan.value is not None:
            value = _same_shape("value", plan.value(value), value)
        for control in plan.controls:
            if control.head_gain is not None and query.shape[2] != heads:
                raise NotImplementedError(
                    f"flashbrush: a derived head gain compares all {heads} heads, but tensor parallelism leaves "
                    f"{query.shape[2]} on this rank; use a method without one"
                )
        if mask is not None and (plan.extra or plan.parts or plan.order is not None):
            what = "extra keys" if plan.extra else "parts" if plan.parts else "order"
            raise NotImplementedError(f"flashbrush: attention_mask together with a plan's {what}")
        self.stats = ()
        if plan.parts:
            return self._attend_in_parts(plan, query, key, value)
        if plan.order is not None:
            query, key, value = (_sorted(t, plan.order) for t in (query, key, value))
        keys: Tensor | Sequence[Tensor] = key
        joined: Tensor | Sequence[Tensor] = value
        source: Mapping | None = plan.source
        if plan.extra:
            keys, joined, source = _segment_lists(plan, key, value, plan.source)
        out = self._call(None, query, keys, joined, plan.control, source, plan.scale, mask=mask)
        return out if plan.order is None else _sorted(out, plan.order.argsort(-1))

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        # A dense mask has no fused path here: the stock call is the fastest one.
        if self.defer or self._attention_backend is not None or mask is not None:
            backend: Any = self._attention_backend if mask is None or self.dispatches else "native"
            return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)
        return attention(query, key, value, backend=self.backend)

    def _call(
        self,
        items: tuple[int, ...] | None,
        query: Tensor,
        key: Tensor | Sequence[Tensor],
        value: Tensor | Sequence[Tensor],
        control: Control | None,
        source: Mapping | None,
        scale: float | Tensor | None,
        **options: Any,
    ) -> Tensor:
        options |= {"source": source, "scale": scale, "backend": self.backend}
        if not self.collect or control is None:
            return attention(query, key, value, control, **options)
        out, stats = attention(query, key, value, control, return_stats=True, **options)
        self.stats = (*self.stats, (items, stats))
        return out

    def _attend_in_parts(self, plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each part's call, and one for the items in none, written into one tensor.

        Queries, keys and values are read where they are, by views or by index.
        """
        rest = plan.rest(query.shape[0])
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        # A gradient needs tensors that nobody writes into; otherwise each call writes where its output belongs.
        out = None if learns else torch.empty_like(query, memory_format=torch.contiguous_format)
        outputs = []
        calls: list[tuple[tuple[int, ...], Part | None]] = [(rest, None)] if rest else []
        for items, part in (*calls, *((tuple(part.items), part) for part in plan.parts)):
            run = _as_slice(items)
            place = None if out is None or run is None else out[run]
            if part is not None:
                keys, values, source = _part_lists(part, key, value)
                done = self._call(items, query, keys, values, part.control, source, part.scale, out=place)
            else:
                done = self._rest(plan, items, run, query, key, value, place)
            if out is None:
                outputs.append((items, done))
            elif place is None:
                out.index_copy_(0, _index(items, out.device), done)
            elif done is not place:
                place.copy_(done)
        if out is not None:
            return out
        order = [n for items, _ in outputs for n in items]
        inverse = tuple(order.index(n) for n in range(len(order)))
        return torch.cat([done for _, done in outputs]).index_select(0, _index(inverse, query.device))

    def _rest(
        self, plan: Plan, items: tuple[int, ...], run: slice | None, query: Tensor, key: Tensor, value: Tensor,
        place: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if plan.control is None and plan.source is None and plan.scale is None:
            where = _index(items, query.device) if run is None else run
            if self.defer or self._attention_backend is not None:
                # Other backends do not read by index: scattered items are copied for them.
                return self._plain(query[where], key[where], value[where])
            if run is not None:
                return attention(query[run], key[run], value[run], backend=self.backend, out=place)
        index = _index(items, query.device)
        source = {"q": index, "k": index, "v": index} | dict(plan.source or {})
        keys: Tensor | Sequence[Tensor] = key
        values: Tensor | Sequence[Tensor] = value
        if plan.extra:
            keys, values, source = _segment_lists(plan, key, value, source)
        return self._call(items, query, keys, values, plan.control, source, plan.scale, out=place)


def join(
    streams: list[tuple[Tensor, nn.Module | None]], offset: Tensor | None, rope: tuple[Tensor, Tensor] | None
) -> Tensor:
    """q or k of the streams: normalised, joined, with the plan's offset, rotated by FLUX's interleaved RoPE.

    Args:
        streams: [(x (batch, tokens, heads, dim), its norm over dim or None), ...].
        offset: broadcastable to (batch, all tokens, heads, dim).
        rope: cos and sin (all tokens, dim), or None.
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
    """Whether the norm is nothing but RMSNorm: no hooks (offloading), no other forward, weights and x of one dtype."""
    if type(norm) not in (nn.RMSNorm, RMSNorm) or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    if norm.weight is None or getattr(norm, "bias", None) is not None:
        return False
    return "forward" not in norm.__dict__ and norm.weight.dtype == x.dtype and norm.weight.device == x.device


def _eps(norm: nn.Module, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else float(norm.eps)  # type: ignore[arg-type]


def _sorted(x: Tensor, order: Tensor) -> Tensor:
    """x (batch, tokens, ...) with its tokens in the order (tokens,) or (batch, tokens)."""
    if order.dim() == 1:
        return x.index_select(1, order)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], order]


def _same_shape(name: str, result: Tensor, given: Tensor) -> Tensor:
    if result.shape != given.shape:
        raise ValueError(f"Plan.{name}: expected a tensor of shape {tuple(given.shape)}, got {tuple(result.shape)}")
    return result


def _segment_lists(plan: Plan, key: Tensor, value: Tensor, source: Mapping | None):
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
    if source is None:
        return keys, values, None
    lists = {n: index if n == "q" else [index if mine else None for mine in own] for n, index in source.items()}
    return keys, values, lists


def _part_lists(part: Part, key: Tensor, value: Tensor):
    """k and v, one view for each key segment where several items' keys are joined; and the source to match."""
    source: dict[str, Any] = {name: part.indices(name) for name in ("q", "k", "v")}
    source = {name: tuple(t.to(key.device) for t in index) for name, index in source.items()}
    times, source["q"] = len(source["k"]), source["q"][0]
    if times == 1:
        return key, value, source | {"k": source["k"][0], "v": source["v"][0]}
    if part.control is None:
        return [key] * times, [value] * times, source
    keys, values, which, start = [], [], [], 0
    for length in part.control.keys.lengths:
        turn, first = divmod(start, key.shape[1]) if length else (0, 0)
        keys.append(key[:, first : first + length])
        values.append(value[:, first : first + length])
        which.append(turn)
        start += length
    return keys, values, source | {name: [source[name][turn] for turn in which] for name in ("k", "v")}


def _as_slice(items: tuple[int, ...]) -> slice | None:
    """The slice that selects just these items in their order, where there is one."""
    first, last, step = items[0], items[-1], items[1] - items[0] if len(items) > 1 else 1
    return slice(first, last + 1, step) if step > 0 and items == tuple(range(first, last + 1, step)) else None


def _index(items: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, so that no call copies from the host.
    return torch.tensor(items, device=device) if torch.compiler.is_compiling() else _kept_index(items, device)


@lru_cache(maxsize=256)
def _kept_index(items: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode would be of no use to a later gradient
        return torch.tensor(items, device=device)

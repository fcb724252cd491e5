"""What every architecture's processor shares: a plan turned into calls of flashbrush.attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ....bindings import Control, Stats, attention, merge, qk_norm_rope
from ..protocol.batch_call import Pair, Part, made_extra
from ..protocol.plan import Plan, Seen


class ControlledProcessor:
    """Holds the plan of the coming call. A plain object: no weights, nothing in a state_dict.

    A compiled block reads from it only tensors and static structure; what differs from layer to layer (index,
    name) stays with the handle, so that all blocks of a kind share one compilation.

    Args:
        plan: what to do; None: plain attention.
        backend: as in attention().
        collect: leave the Stats of a controlled call in `stats`.
    """

    # The two attributes through which diffusers configures a processor.
    _attention_backend = None
    _parallel_config = None
    # Whether the stock processors call diffusers' dispatcher; those that do not take a mask whatever backend
    # is set.
    dispatches = True

    def __init__(self, plan: Plan | None = None, *, backend: str = "auto", collect: bool = False) -> None:
        self.plan = plan
        self.backend = backend
        self.collect = collect
        self.planned = True  # False: a method is in charge and has not been asked yet
        self.defer = False  # plain calls go to diffusers' dispatcher, unchanged
        self.prepared: int | None = None  # the batch that Handle.prepare() has planned for
        self.running = True  # False: the forward pass is over, and what runs a layer again is a backward pass
        self.original: Any = None  # of a processor whose control is removed, the one that it stood for
        # (the items of the batch, None: all; their Stats) of each controlled call
        self.stats: tuple[tuple[tuple[int, ...] | None, Stats], ...] = ()

    def replace(self, attn: Any, original: Any) -> None:
        """Take over what the processor in place decides; TypeError where this one is no drop-in for it after
        all.
        """
        if (backend := getattr(original, "_attention_backend", None)) is not None:
            self._attention_backend = backend

    def retire(self, original: Any) -> None:
        """From now on plain attention, as diffusers does it, should somebody put this processor back."""
        if hasattr(original, "_attention_backend"):
            original._attention_backend = self._attention_backend
        self.plan, self.planned, self.defer, self.collect, self.original = None, True, True, False, original

    def hidden(self, x: Tensor) -> Tensor:
        """The image's hidden states, (batch, tokens, channels), as the plan wants them projected.

        Comes first in a call: a plan that is made late is made here.
        """
        if self.plan is not None and self.plan.late is not None:
            self.plan = self.plan.late()
        if self.plan is None or self.plan.hidden is None:
            return x
        return _same_shape("hidden", self.plan.hidden(x), x)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        values: list[Tensor],
        mask: Tensor | None,
        heads: int,
        *,
        cross: bool = False,
    ) -> Tensor:
        """The plan's attention; q, k and the result (batch, tokens, heads on this rank, dim).

        Args:
            values: v of each stream, in the order in which k is joined.
            mask: the attention_mask of diffusers, broadcastable to (batch, heads, rows, keys).
            heads: heads of the layer on all ranks together.
            cross: whether the keys are other tokens than the rows.

        Raises:
            NotImplementedError: context parallelism; a derived gain where heads are spread over ranks; a mask
                with extra keys, parts or an order. RuntimeError: the method has not been asked. ValueError: a
                transform changed a shape.
        """
        if self._parallel_config is not None:
            raise NotImplementedError(
                "flashbrush: context parallelism is configured, but a processor sees only its rank's tokens; "
                "disable it, or remove() the control"
            )
        if not self.planned:
            raise RuntimeError(
                "flashbrush: the method has not been asked for a plan, because the model's forward pre-hook did not run "
                "outside of the compiled region; call handle.prepare() with the sizes of the call before the model, and "
                "handle.set_step() before each step"
            )
        if self.prepared is not None and self.prepared != query.shape[0]:
            raise RuntimeError(
                f"flashbrush: handle.prepare() was told of a batch of {self.prepared}, but {query.shape[0]} came; call it again"
            )
        value = torch.cat(values, 1) if len(values) > 1 else values[0]
        if query.dtype != value.dtype:
            # Autocast may leave the norms' outputs in float32.
            query, key = query.to(value.dtype), key.to(value.dtype)
        plan = self.plan
        if plan is None:
            return self._plain(query, key, value, mask)
        for control in plan.controls:
            if control.head_gain is not None and query.shape[2] != heads:
                raise NotImplementedError(
                    f"flashbrush: a derived head gain compares all {heads} heads, but tensor parallelism leaves "
                    f"{query.shape[2]} on this rank; use a method without one"
                )
        if mask is not None and (plan.extra or plan.parts or plan.order is not None or plan.see is not None):
            what = (
                "extra keys"
                if plan.extra
                else "parts"
                if plan.parts
                else "order"
                if plan.see is None
                else "see"
            )
            raise NotImplementedError(f"flashbrush: attention_mask together with a plan's {what}")
        self.stats = ()
        if plan.see is None:
            return self._planned(plan, query, key, value, mask, cross)
        if not plan.is_plain:
            out = self._planned(plan, query, key, value, None, cross)
            plan.see(Seen(query, key, value, again=not self.running))
            return out
        out, stats = attention(query, key, value, backend=self.backend, return_stats=True)
        plan.see(Seen(query, key, value, stats.lse, again=not self.running))
        return out

    def _planned(
        self, plan: Plan, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cross: bool
    ) -> Tensor:
        if plan.query is not None:
            query = _same_shape("query", plan.query(query), query)
        if plan.value is not None:
            value = _same_shape("value", plan.value(value), value)
        if plan.parts:
            return self._attend_in_parts(plan, query, key, value)
        extra = made_extra(plan.extra, key, value)
        if plan.order is not None:
            query = _sorted(query, plan.order)
            if not cross:
                key, value = _sorted(key, plan.order), _sorted(value, plan.order)
        keys: Tensor | Sequence[Tensor] = key
        joined: Tensor | Sequence[Tensor] = value
        source: Mapping | None = plan.source
        if extra:
            keys, joined, source = _segment_lists(plan.control, extra, [(key, value)], plan.source)
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
        if not (self.collect and self.running) or control is None:
            return attention(query, key, value, control, **options)
        out, stats = attention(query, key, value, control, return_stats=True, **options)
        self.stats = (*self.stats, (items, stats))
        return out

    def _attend_in_parts(self, plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each part's call, and one for the items in none, written into one tensor or added there.

        Queries, keys and values are read where they are, by views or by index.
        """
        rest = plan.rest(query.shape[0])
        several = {
            n for part in plan.parts for n in part.items if sum(n in other.items for other in plan.parts) > 1
        }
        added = [not several.isdisjoint(part.items) for part in plan.parts]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        # A gradient needs tensors that nobody writes into; otherwise each call writes where its output
        # belongs.
        out = (
            torch.zeros_like(query)
            if learns
            else torch.empty_like(query, memory_format=torch.contiguous_format)
        )
        if not learns and several:
            for items in {tuple(part.items) for part, adds in zip(plan.parts, added, strict=True) if adds}:
                out[_where(items, out.device)] = 0
        calls: list[tuple[tuple[int, ...], Part | None, bool]] = [(rest, None, False)] if rest else []
        calls += [(tuple(part.items), part, adds) for part, adds in zip(plan.parts, added, strict=True)]
        for items, part, adds in calls:
            run = _as_slice(items)
            place = None if learns or adds or run is None else out[run]
            if part is None:
                done = self._rest(plan, items, run, query, key, value, place)
            else:
                done = self._part(part, items, run, query, key, value, place)
            if learns:
                out = out.index_add(0, _index(items, out.device), done)
            elif adds:
                out.index_add_(0, _index(items, out.device), done)
            elif place is None:
                out.index_copy_(0, _index(items, out.device), done)
            elif done is not place:
                place.copy_(done)
        return out

    def _part(
        self,
        part: Part,
        items: tuple[int, ...],
        run: slice | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
    ) -> Tensor:
        """(items, rows, heads, dim), in `place` where that is given and possible"""
        device = key.device
        source: dict[str, Any] = {n: [t.to(device) for t in part.indices(n)] for n in ("q", "k", "v")}
        source["q"] = source["q"][0]
        extra = made_extra(part.extra, key, value)
        if part.query is not None:
            taken = query[run] if run is not None and "q" not in (part.source or {}) else query[source["q"]]
            query, source["q"] = _same_shape("query", part.query(taken), taken), None
        if part.value is not None:
            taken = value[source["v"][0]]
            value, source["v"] = _same_shape("value", part.value(taken), taken), [None]
        if part.isolated is not None:
            out = _isolated(part, query, key, value, source, self.backend)
        elif part.query is not None and part.control is None and query.stride(1) == 0 and query.shape[1] > 1:
            # Queries that are all the same, as an infinite blur leaves them, attend once.
            rows, query = query.shape[1], query[:, :1]
            out = self._keys_of(part, items, query, key, value, source, extra, None).expand(-1, rows, -1, -1)
        else:
            out = self._keys_of(part, items, query, key, value, source, extra, place)
        if part.gate is None:
            return out
        gate = part.gate.to(out)[..., None, None] if isinstance(part.gate, Tensor) else part.gate
        return out * gate

    def _keys_of(
        self,
        part: Part,
        items: tuple[int, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        source: dict[str, Any],
        extra: Mapping[str, Pair],
        place: Tensor | None,
    ) -> Tensor:
        """The part's attention, its keys sorted, split and joined as it says."""
        if (order := part.key_order) is not None:
            if order.dim() == 2 or len(items) < key.shape[0]:
                key, value = (
                    t if i is None else t[i] for t, i in ((key, source["k"][0]), (value, source["v"][0]))
                )
                source |= {"k": [None], "v": [None]}
            key = _sorted(key, order)
            value = _sorted(value, order)
        times = len(source["k"])
        keys: Tensor | Sequence[Tensor] = [key] * times
        values: Tensor | Sequence[Tensor] = [value] * times
        if part.control is not None and (times > 1 or extra):
            keys, values, lists = _segment_lists(part.control, extra, [(key, value)] * times, source)
            source = lists or {}
        elif times == 1:
            keys, values, source = key, value, source | {"k": source["k"][0], "v": source["v"][0]}
        if isinstance(source["k"], list) and all(index is None for index in source["k"]):
            source["k"] = None
        if isinstance(source["v"], list) and all(index is None for index in source["v"]):
            source["v"] = None
        return self._call(items, query, keys, values, part.control, source, part.scale, out=place)

    def _rest(
        self,
        plan: Plan,
        items: tuple[int, ...],
        run: slice | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
    ) -> Tensor:
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
        if extra := made_extra(plan.extra, key, value):
            keys, values, source = _segment_lists(plan.control, extra, [(key, value)], source)
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
    """Whether the norm is nothing but RMSNorm: no hooks (offloading), no other forward, weights and x of one
    dtype.
    """
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
        raise ValueError(
            f"Plan.{name}: expected a tensor of shape {tuple(given.shape)}, got {tuple(result.shape)}"
        )
    return result


def _segment_lists(
    control: Control | None, extra: Mapping, own: Sequence[tuple[Tensor, Tensor]], source: Mapping | None
):
    """One tensor per key segment, views of the layer's own (as often as they are joined) and extra ones; and
    the source.

    The source's indices are those of the layer's own items, for k and v one or one for each of `own`; extra
    keys belong to the output item, or to all.
    """
    assert control is not None
    keys, values, turns, start = [], [], [], 0
    for name, length in zip(control.keys.names, control.keys.lengths, strict=True):
        if name in extra:
            extra_key, extra_value = extra[name]
            keys.append(extra_key)
            values.append(extra_value)
            turns.append(None)
            continue
        turn, first = divmod(start, own[0][0].shape[1]) if length else (0, 0)
        key, value = own[turn]
        keys.append(key[:, first : first + length])
        values.append(value[:, first : first + length])
        turns.append(turn)
        start += length
    if source is None:
        return keys, values, None
    lists = {}
    for name, index in source.items():
        each = index if isinstance(index, list) else [index] * len(own)
        lists[name] = index if name == "q" else [None if turn is None else each[turn] for turn in turns]
    return keys, values, lists


def _isolated(part: Part, query: Tensor, key: Tensor, value: Tensor, source: Mapping, backend: str) -> Tensor:
    """Attention in which the last tokens see, of those, only themselves; (items, tokens, heads, dim)."""
    query, key, value = (
        t if index is None else t[index]
        for t, index in ((query, source["q"]), (key, source["k"][0]), (value, source["v"][0]))
    )
    assert part.isolated is not None
    shared = query.shape[1] - part.isolated
    if not shared:
        # One key a row: its probability is 1.
        return value
    scale = query.shape[-1] ** -0.5 if part.scale is None else part.scale
    first = attention(query[:, :shared], key, value, scale=scale, backend=backend)
    own = query[:, shared:]
    seen, stats = attention(
        own, key[:, :shared], value[:, :shared], scale=scale, backend=backend, return_stats=True
    )
    logit = (own.float() * key[:, shared:].float()).sum(-1).transpose(1, 2)  # (items, heads, isolated)
    if isinstance(scale, Tensor):
        scale = scale.float().reshape(scale.shape[0], -1, 1)
    last, _ = merge([(seen, stats.lse), (value[:, shared:], (logit * scale)[..., None])])
    return torch.cat([first, last], 1)


def _as_slice(items: tuple[int, ...]) -> slice | None:
    """The slice that selects just these items in their order, where there is one."""
    first, last, step = items[0], items[-1], items[1] - items[0] if len(items) > 1 else 1
    return slice(first, last + 1, step) if step > 0 and items == tuple(range(first, last + 1, step)) else None


def _where(items: tuple[int, ...], device: torch.device) -> slice | Tensor:
    return _index(items, device) if (run := _as_slice(items)) is None else run


def _index(items: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, so that no call copies from the host.
    return torch.tensor(items, device=device) if torch.compiler.is_compiling() else _kept_index(items, device)


@lru_cache(maxsize=256)
def _kept_index(items: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode would be of no use to a later gradient
        return torch.tensor(items, device=device)

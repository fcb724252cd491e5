"""PlanCall: computes one layer's attention from its plan, by calls of flashbrush.attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ....bindings import Control, Stats, attention
from .batch_call import Part
from .fields import Extra, Pair
from .plan import LatePlan, Plan, Seen

# The batch items of a controlled call (None: all) and its statistics.
CallStats = tuple[tuple[int, ...] | None, Stats]


@dataclass
class CallState:
    """What one layer does in its next call.

    Attributes:
        plan: what to do, or a function that returns it when the layer is reached; None: plain attention.
        controlled: apply() selected the layer and the step. Hooks of a method's attach() act where it is
            True.
        stock: plain attention goes through diffusers' dispatcher, as in the unchanged model.
        collect: keep the Stats of controlled calls.
        batch: the batch that Handle.prepare() planned for, which the call must have; None: any.
        again: the forward pass is over; a call now is a backward pass with gradient checkpointing.
    """

    plan: Plan | LatePlan | None = None
    controlled: bool = False
    stock: bool = False
    collect: bool = False
    batch: int | None = None
    again: bool = False


class PlanCall:
    """One layer's attention in one forward call, as its plan says.

    Args:
        plan: what to do.
        backend: as in attention().
        collect: keep the Stats of the controlled calls in `stats`.
        again: whether a backward pass with gradient checkpointing runs the layer a second time.
        plain: attention (q, k, v) -> out of the items that the plan leaves plain; None: attention(), which
            reads them in place.

    Attributes:
        stats: of each controlled call with a control, in the order of the calls.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        backend: str = "auto",
        collect: bool = False,
        again: bool = False,
        plain: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.plan, self.backend, self.collect, self.again, self.plain = plan, backend, collect, again, plain
        self.stats: tuple[CallStats, ...] = ()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, cross: bool = False
    ) -> Tensor:
        """The attention's output (batch, rows, heads, head_dim).

        Args:
            query: (batch, rows, heads, head_dim), after norm, offset and RoPE.
            key: (batch, keys, heads, head_dim), likewise.
            value: (batch, keys, heads, head_dim).
            mask: as in attention(); not with extra keys, parts, an order or see.
            cross: whether keys are other tokens than rows: Plan.order then sorts the rows alone.

        Raises:
            NotImplementedError: a mask with a plan that cannot take one.
            ValueError: a transform changed a shape.
        """
        plan = self.plan
        if mask is not None:
            self._check_takes_mask()
        if plan.see is None:
            return self._attend(query, key, value, mask, cross)
        if not plan.is_plain:
            out = self._attend(query, key, value, None, cross)
            plan.see(Seen(query, key, value, again=self.again))
            return out
        out, stats = attention(query, key, value, backend=self.backend, return_stats=True)
        plan.see(Seen(query, key, value, stats.lse, again=self.again))
        return out

    def _check_takes_mask(self) -> None:
        plan = self.plan
        fields = {
            "extra keys": plan.extra,
            "parts": plan.parts,
            "order": plan.order is not None,
            "see": plan.see is not None,
        }
        if given := [name for name, value in fields.items() if value]:
            raise NotImplementedError(f"flashbrush: attention_mask together with a plan's {given[0]}")

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cross: bool) -> Tensor:
        plan = self.plan
        if plan.query is not None:
            query = same_shape("Plan.query", plan.query(query), query)
        if plan.value is not None:
            value = same_shape("Plan.value", plan.value(value), value)
        if plan.parts:
            return self._attend_in_parts(query, key, value)
        extra = _made_extra(plan.extra, key, value)
        if plan.order is not None:
            query = _sorted(query, plan.order)
            if not cross:
                key, value = _sorted(key, plan.order), _sorted(value, plan.order)
        keys: Tensor | Sequence[Tensor] = key
        values: Tensor | Sequence[Tensor] = value
        source: Mapping | None = plan.source
        if extra:
            keys, values, source = _segment_lists(plan.control, extra, [(key, value)], plan.source)
        out = self._call(None, query, keys, values, plan.control, source, plan.scale, mask=mask)
        return out if plan.order is None else _sorted(out, plan.order.argsort(-1))

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

    def _attend_in_parts(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One call per part and one for the items in no part, each written or added into one output tensor.

        Queries, keys and values are read in place: by views, or by index.
        """
        plan = self.plan
        rest = plan.rest(query.shape[0])
        several = {
            n for part in plan.parts for n in part.items if sum(n in other.items for other in plan.parts) > 1
        }
        added = [not several.isdisjoint(part.items) for part in plan.parts]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        # Autograd forbids writing in place; without it each call writes into its rows of the output.
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
            target = None if learns or adds or run is None else out[run]
            if part is None:
                done = self._attend_rest(items, run, query, key, value, target)
            else:
                done = self._attend_part(part, items, run, query, key, value, target)
            if learns:
                out = out.index_add(0, _index(items, out.device), done)
            elif adds:
                out.index_add_(0, _index(items, out.device), done)
            elif target is None:
                out.index_copy_(0, _index(items, out.device), done)
            elif done is not target:
                target.copy_(done)
        return out

    def _attend_rest(
        self,
        items: tuple[int, ...],
        run: slice | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        target: Tensor | None,
    ) -> Tensor:
        """(items, rows, heads, head_dim) of the items in no part; in `target` where given and possible."""
        plan = self.plan
        if plan.control is None and plan.source is None and plan.scale is None:
            where = _index(items, query.device) if run is None else run
            if self.plain is not None:
                # `plain` cannot read by index: scattered items are copied.
                return self.plain(query[where], key[where], value[where])
            if run is not None:
                return attention(query[run], key[run], value[run], backend=self.backend, out=target)
        index = _index(items, query.device)
        source = {"q": index, "k": index, "v": index} | dict(plan.source or {})
        keys: Tensor | Sequence[Tensor] = key
        values: Tensor | Sequence[Tensor] = value
        if extra := _made_extra(plan.extra, key, value):
            keys, values, source = _segment_lists(plan.control, extra, [(key, value)], source)
        return self._call(items, query, keys, values, plan.control, source, plan.scale, out=target)

    def _attend_part(
        self,
        part: Part,
        items: tuple[int, ...],
        run: slice | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        target: Tensor | None,
    ) -> Tensor:
        """(items, rows, heads, head_dim) of a part; in `target` where given and possible."""
        device = key.device
        source: dict[str, Any] = {n: [t.to(device) for t in part.indices(n)] for n in ("q", "k", "v")}
        source["q"] = source["q"][0]
        extra = _made_extra(part.extra, key, value)
        if part.query is not None:
            taken = query[run] if run is not None and "q" not in (part.source or {}) else query[source["q"]]
            query, source["q"] = same_shape("Part.query", part.query(taken), taken), None
        if part.value is not None:
            taken = value[source["v"][0]]
            value, source["v"] = same_shape("Part.value", part.value(taken), taken), [None]
        if part.attend is not None:
            q, k, v = (
                t if index is None else t[index]
                for t, index in ((query, source["q"]), (key, source["k"][0]), (value, source["v"][0]))
            )
            out = same_shape("Part.attend", part.attend(q, k, v, backend=self.backend), q)
        elif part.query is not None and part.control is None and query.stride(1) == 0 and query.shape[1] > 1:
            # All queries are the same, as after an infinite blur: one row attends and is broadcast.
            rows, query = query.shape[1], query[:, :1]
            out = self._attend_keys(part, items, query, key, value, source, extra, None)
            out = out.expand(-1, rows, -1, -1)
        else:
            out = self._attend_keys(part, items, query, key, value, source, extra, target)
        if part.gate is None:
            return out
        gate = part.gate.to(out)[..., None, None] if isinstance(part.gate, Tensor) else part.gate
        return out * gate

    def _attend_keys(
        self,
        part: Part,
        items: tuple[int, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        source: dict[str, Any],
        extra: Mapping[str, Pair],
        target: Tensor | None,
    ) -> Tensor:
        """A part's attention, with its keys sorted, split and joined."""
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
        return self._call(items, query, keys, values, part.control, source, part.scale, out=target)


def same_shape(name: str, result: Tensor, given: Tensor) -> Tensor:
    """The result of a transform; ValueError where its shape is not that of its input."""
    if result.shape != given.shape:
        raise ValueError(
            f"{name}: expected a tensor of shape {tuple(given.shape)}, got {tuple(result.shape)}"
        )
    return result


def _made_extra(extra: Extra | None, key: Tensor, value: Tensor) -> Mapping[str, Pair]:
    """The extra keys as tensors of the layer's dtype; callables are called with its k and v."""
    pairs = {n: pair(key, value) if callable(pair) else pair for n, pair in (extra or {}).items()}
    # Kept keys can have another dtype than the layer: under autocast, or after the model was cast.
    return {n: (k.to(key.dtype), v.to(value.dtype)) for n, (k, v) in pairs.items()}


def _segment_lists(
    control: Control | None, extra: Mapping[str, Pair], own: Sequence[Pair], source: Mapping | None
) -> tuple[list[Tensor], list[Tensor], dict | None]:
    """One tensor per key segment of the control, as attention() takes them.

    Args:
        extra: {key segment: (k, v)}; they belong to the output item, or to all items.
        own: the layer's (k, v), once per joined set of keys; segments are views of it.
        source: indices of batch items; for k and v one, or one per entry of `own`.

    Returns:
        Keys, values, and the source with one index per segment (None: extra keys).
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


def _sorted(x: Tensor, order: Tensor) -> Tensor:
    """x (batch, tokens, ...) with its tokens in the order (tokens,) or (batch, tokens)."""
    if order.dim() == 1:
        return x.index_select(1, order)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], order]


def _as_slice(items: tuple[int, ...]) -> slice | None:
    """The slice that selects exactly these items in their order; None: there is none."""
    first, last, step = items[0], items[-1], items[1] - items[0] if len(items) > 1 else 1
    return slice(first, last + 1, step) if step > 0 and items == tuple(range(first, last + 1, step)) else None


def _where(items: tuple[int, ...], device: torch.device) -> slice | Tensor:
    return _index(items, device) if (run := _as_slice(items)) is None else run


def _index(items: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 (items,) on the device, kept so that a call copies nothing from the host."""
    return torch.tensor(items, device=device) if torch.compiler.is_compiling() else _kept_index(items, device)


@lru_cache(maxsize=256)
def _kept_index(items: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used in a later backward pass
        return torch.tensor(items, device=device)

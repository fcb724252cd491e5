"""Part: some items of a batch in an attention call of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....bindings import Control
from .fields import (
    Extra,
    broadcasts,
    check_callables,
    check_control,
    check_extra,
    check_extra_shapes,
    check_source_names,
    check_tables,
    moved,
    moved_extra,
)
from .layer import Layer


@dataclass(frozen=True, eq=False)
class Part:
    """Some items of a batch in an attention call of their own.

    All items of one call share its key tensors, softmax groups, contrast and segments. Items that differ in
    these go into different parts. Keys and values are read in place, by index. An item in several parts gets
    the sum of their outputs.

    Args:
        items: batch items whose output the part computes; no item twice.
        source: {"q": index, "k": index, "v": index}, int tensors (items,): the batch item from which each of
            `items` reads; itself where not given. For k and v also a sequence of such tensors: the keys of
            several items, joined in one softmax.
        control: its rows are the layer's; its keys are those in `extra` and, per index of k, the layer's.
            A key segment may not span the keys of two indices. Tables with a batch dimension are for `items`.
            None: plain attention.
        scale: as in attention(): a number, or a tensor (items,) or (items, heads).
        extra: as Plan.extra, (1 or items, length, heads, head_dim). A callable gets k and v of the whole
            batch, before `value`.
        key_order: int64 (keys,) or (items, keys): the control's key i is the layer's token key_order[i], as
            Segments.from_labels sorts a mask of the keys. For one index of k.
        query: maps q (items, rows, heads, head_dim) to a tensor of the same shape.
        value: maps v (items, keys, heads, head_dim), before `key_order`, to a tensor of the same shape. For
            one index of v.
        gate: multiplies the output: a number, or a tensor (items, rows).
        attend: computes the output in place of attention(), for a formula that a Control cannot express:
            ``attend(q, k, v, backend=name) -> (items, rows, heads, head_dim)``, with q, k, v (items, tokens,
            heads, head_dim) after `source`, `query` and `value`. Only these and `gate` may be given with it.

    Raises:
        TypeError: a field of another type.
        ValueError: no item; an item twice; a `source` with keys other than q, k and v, with an index of
            another length than `items`, or with different numbers of indices for k and v; fields that exclude
            each other.

    Examples:
        Item 1 attends to the keys and values of item 0:

        >>> import torch
        >>> from flashbrush.integrations.diffusers import Part, Plan
        >>> zero = torch.tensor([0])
        >>> plan = Plan(parts=[Part([1], source={"k": zero, "v": zero})])
        >>> plan.rest(batch=2)
        (0,)
    """

    items: Sequence[int]
    source: Mapping[str, Tensor | Sequence[Tensor]] | None = None
    control: Control | None = None
    scale: float | Tensor | None = None
    extra: Extra | None = None
    key_order: Tensor | None = None
    query: Callable[[Tensor], Tensor] | None = None
    value: Callable[[Tensor], Tensor] | None = None
    gate: float | Tensor | None = None
    attend: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.items, Tensor) or not all(
            isinstance(n, int) and not isinstance(n, bool) for n in self.items
        ):
            raise TypeError(f"Part.items: expected a sequence of ints, got {self.items!r}")
        if not self.items or min(self.items) < 0 or len(set(self.items)) < len(self.items):
            raise ValueError(f"Part.items: expected different batch items, at least one, got {self.items!r}")
        object.__setattr__(self, "items", tuple(self.items))
        check_control("Part", self.control)
        self._check_source()
        check_extra("Part", self.extra, self.control)
        check_callables("Part", self, ("query", "value", "attend"))
        if (order := self.key_order) is not None and (
            not isinstance(order, Tensor) or order.dtype != torch.int64
        ):
            got = order.dtype if isinstance(order, Tensor) else type(order).__name__
            raise TypeError(f"Part.key_order: expected an int64 tensor (keys,) or (items, keys), got {got}")
        given = [n for n in ("key_order", "value", "attend") if getattr(self, n) is not None]
        if given and len(self.indices("k")) > 1:
            raise ValueError(
                f"Part.source: expected one index of k and v together with {given[0]}, "
                f"got {len(self.indices('k'))}"
            )
        if not isinstance(self.gate, Tensor) and not (self.gate is None or _is_finite(self.gate)):
            raise TypeError(
                f"Part.gate: expected a finite number, a tensor (items, rows) or None, got {self.gate!r}"
            )
        if self.attend is not None:
            taken = ("control", "scale", "extra", "key_order")
            if others := [name for name in taken if getattr(self, name) is not None]:
                raise ValueError(f"Part.attend: expected no {', '.join(taken)} with it, got {others[0]}")

    def _check_source(self) -> None:
        check_source_names("Part", self.source)
        if isinstance((self.source or {}).get("q"), Sequence):
            raise TypeError("Part.source['q']: expected one int tensor (items,), got a sequence")
        for name in self.source or ():
            for index in self.indices(name):
                if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
                    got = index.dtype if isinstance(index, Tensor) else type(index).__name__
                    raise TypeError(
                        f"Part.source[{name!r}]: expected int32 or int64 tensors (items,), got {got}"
                    )
                if index.shape != (len(self.items),):
                    raise ValueError(
                        f"Part.source[{name!r}]: expected shape ({len(self.items)},), got "
                        f"{tuple(index.shape)}"
                    )
        if len(self.indices("k")) != len(self.indices("v")) or not self.indices("k"):
            raise ValueError(
                f"Part.source: expected as many indices for v as for k, at least one, "
                f"got {len(self.indices('k'))} for k and {len(self.indices('v'))} for v"
            )

    def indices(self, name: str) -> tuple[Tensor, ...]:
        """The items that "q", "k" or "v" is read from: int tensors (items,), one per joined set of keys."""
        index = (self.source or {}).get(name)
        if index is None:
            index = torch.tensor(self.items)
        return (index,) if isinstance(index, Tensor) else tuple(index)

    def check(self, layer: Layer) -> None:
        """ValueError where the part does not fit the layer: items, token counts, batch, heads."""
        where, n = f"layer {layer.index} ({layer.kind})", len(self.items)
        if max(self.items) >= layer.batch:
            raise ValueError(
                f"Part.items: expected items below the batch of {layer.batch} in {where}, got {self.items}"
            )
        for name in ("q", "k", "v"):
            for index in self.indices(name):
                low, high = (int(index.min()), int(index.max())) if index.device.type == "cpu" else (0, 0)
                if low < 0 or high >= layer.batch:
                    raise ValueError(
                        f"Part.source[{name!r}]: expected items in 0..{layer.batch - 1} for {where}, "
                        f"got {index.tolist()}"
                    )
        if self.key_order is not None and tuple(self.key_order.shape) not in ((layer.keys,), (n, layer.keys)):
            raise ValueError(
                f"Part.key_order: expected a shape of ({layer.keys},) or ({n}, {layer.keys}) for {where}, "
                f"got {tuple(self.key_order.shape)}"
            )
        if isinstance(self.gate, Tensor) and not broadcasts(self.gate, (n, layer.rows)):
            raise ValueError(
                f"Part.gate: expected a shape of ({n}, {layer.rows}) for {where}, got "
                f"{tuple(self.gate.shape)}"
            )
        if self.control is not None:
            self._check_control_fits(self.control, layer, where)

    def _check_control_fits(self, control: Control, layer: Layer, where: str) -> None:
        check_tables("Part.control", control, len(self.items), layer)
        check_extra_shapes("Part", self.extra, control, len(self.items), layer)
        times, keys, extra = len(self.indices("k")), control.keys, self.extra or {}
        own = keys.total - sum(keys.lengths[keys.index(name)] for name in extra)
        for name, total, expected in (
            ("rows", control.rows.total, layer.rows),
            ("keys", own, times * layer.keys),
        ):
            if total != expected:
                raise ValueError(f"Part.control.{name}: {total} tokens for {where}, expected {expected}")
        if times > 1 and keys.items is not None:
            raise ValueError("Part.control: its key segments must be equally long in every item of the batch")
        start = 0
        for name, length in zip(keys.names, keys.lengths, strict=True):
            if name in extra:
                continue
            if times > 1 and length and start // layer.keys != (start + length - 1) // layer.keys:
                raise ValueError(
                    f"Part.control: the key segment {name!r} spans the keys of two items "
                    f"({layer.keys} each in {where})"
                )
            start += length

    def to(self, device: torch.device) -> Part:
        """This part with its tensors on `device`."""
        source = {name: tuple(t.to(device) for t in self.indices(name)) for name in ("q", "k", "v")}
        return replace(
            self,
            source={"q": source["q"][0], "k": source["k"], "v": source["v"]},
            control=None if self.control is None else self.control.to(device),
            scale=moved(self.scale, device),
            extra=moved_extra(self.extra, device),
            key_order=moved(self.key_order, device),
            gate=moved(self.gate, device),
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

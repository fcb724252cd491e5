"""Part: some items of a batch in an attention call of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....bindings import Control
from .layer import Layer

Pair = tuple[Tensor, Tensor]
Extra = Mapping[str, Pair | Callable[[Tensor, Tensor], Pair]]


@dataclass(frozen=True, eq=False)
class Part:
    """Some items of a batch in an attention call of their own.

    The items of one call share its list of keys, softmax groups, contrast and segments. Where they differ in
    those, as where one image of a batch reads the keys of others and contrasts what it reads, each sort of
    item is a Part: no kernel has to know, and K and V stay in place, read by index. An item in several parts
    gets the sum of their outputs: attentions of different queries or maps.

    Args:
        items: the batch items whose output this is; different ones within a part.
        source: {"q": index, "k": index, "v": index}, int tensors (items,): the batch item that each of
            `items` reads; itself where not given. A sequence of indices for k and v: the layer's keys once
            for each, joined in one softmax.
        control: its rows are those of the layer; its keys, other than those in `extra`, are those of the
            layer once for each index of k, in that order; a key segment lies within one of them. Tables with
            a batch are for `items`. None: plain.
        scale: as in attention(): a number, or a tensor (items,) or (items, heads).
        extra: as Plan.extra, (1 or items, length, heads, head_dim); callables get k and v of all items,
            before `value`.
        key_order: int64 (keys,) or (items, keys): the control's i-th key is the layer's token key_order[i],
            as Segments.from_labels sorts a mask of the keys. With one index of k.
        query, value: map q (items, rows, heads, head_dim) and v (items, keys, heads, head_dim), before
            `key_order`, to tensors of the same shape; value with one index of v.
        gate: a number, or a tensor (items, rows), that multiplies the output.
        isolated: the last so many tokens of the layer see, of those, only themselves, and all tokens before
            them; the others see all. Alone, with `source` or with `scale` at most.

    Raises:
        TypeError: a field of another type. ValueError: no item, an item twice, a `source` with other keys, of
            other lengths, or with other numbers of k than of v; fields that do not go together.
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
    isolated: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.items, Tensor) or not all(
            isinstance(n, int) and not isinstance(n, bool) for n in self.items
        ):
            raise TypeError(f"Part.items: expected a sequence of ints, got {self.items!r}")
        if not self.items or min(self.items) < 0 or len(set(self.items)) < len(self.items):
            raise ValueError(f"Part.items: expected different batch items, at least one, got {self.items!r}")
        object.__setattr__(self, "items", tuple(self.items))
        if self.control is not None and not isinstance(self.control, Control):
            raise TypeError(f"Part.control: expected a Control or None, got {type(self.control).__name__}")
        self._check_source()
        check_extra("Part", self.extra, self.control)
        check_callables("Part", self, ("query", "value"))
        if (order := self.key_order) is not None and (
            not isinstance(order, Tensor) or order.dtype != torch.int64
        ):
            got = order.dtype if isinstance(order, Tensor) else type(order).__name__
            raise TypeError(f"Part.key_order: expected an int64 tensor (keys,) or (items, keys), got {got}")
        if len(self.indices("k")) > 1 and (order is not None or self.value is not None):
            what = "a value" if order is None else "a key_order"
            raise ValueError(
                f"Part.source: expected one index of k and v together with {what}, got {len(self.indices('k'))}"
            )
        if not isinstance(self.gate, Tensor) and not (self.gate is None or _is_finite(self.gate)):
            raise TypeError(
                f"Part.gate: expected a finite number, a tensor (items, rows) or None, got {self.gate!r}"
            )
        if self.isolated is not None:
            if isinstance(self.isolated, bool) or not isinstance(self.isolated, int) or self.isolated < 0:
                raise ValueError(f"Part.isolated: expected a number of tokens or None, got {self.isolated!r}")
            if self.control is not None or order is not None or len(self.indices("k")) > 1:
                raise ValueError(
                    "Part.isolated: expected neither a control, a key_order, nor several indices of k beside it"
                )

    def _check_source(self) -> None:
        if unknown := set(self.source or ()) - {"q", "k", "v"}:
            raise ValueError(f"Part.source: expected the keys q, k and v, got {sorted(map(str, unknown))}")
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
                        f"Part.source[{name!r}]: expected shape ({len(self.items)},), got {tuple(index.shape)}"
                    )
        if len(self.indices("k")) != len(self.indices("v")) or not self.indices("k"):
            raise ValueError(
                f"Part.source: expected as many indices for v as for k, at least one, got {len(self.indices('k'))} for k "
                f"and {len(self.indices('v'))} for v"
            )

    def indices(self, name: str) -> tuple[Tensor, ...]:
        """What q, k or v are read from: int tensors (items,), one for each time that the layer's tokens are
        taken.
        """
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
                        f"Part.source[{name!r}]: expected items in 0..{layer.batch - 1} for {where}, got {index.tolist()}"
                    )
        if self.key_order is not None and tuple(self.key_order.shape) not in ((layer.keys,), (n, layer.keys)):
            raise ValueError(
                f"Part.key_order: expected a shape of ({layer.keys},) or ({n}, {layer.keys}) for {where}, "
                f"got {tuple(self.key_order.shape)}"
            )
        if isinstance(self.gate, Tensor) and not broadcasts(self.gate, (n, layer.rows)):
            raise ValueError(
                f"Part.gate: expected a shape of ({n}, {layer.rows}) for {where}, got {tuple(self.gate.shape)}"
            )
        if self.isolated is not None and (layer.kind in ("cross", "added") or self.isolated > layer.rows):
            raise ValueError(
                f"Part.isolated: expected at most {layer.rows} tokens of a layer whose tokens attend to themselves, got "
                f"{self.isolated} for {where}"
            )
        if self.control is not None:
            self._check_control(self.control, layer, where)

    def _check_control(self, control: Control, layer: Layer, where: str) -> None:
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
                    f"Part.control: the key segment {name!r} spans the keys of two items ({layer.keys} each in {where})"
                )
            start += length

    def to(self, device: torch.device) -> Part:
        """This part with its tensors on `device`."""
        source = {name: tuple(t.to(device) for t in self.indices(name)) for name in ("q", "k", "v")}
        return Part(
            self.items,
            {"q": source["q"][0], "k": source["k"], "v": source["v"]},
            None if self.control is None else self.control.to(device),
            moved(self.scale, device),
            moved_extra(self.extra, device),
            moved(self.key_order, device),
            self.query,
            self.value,
            moved(self.gate, device),
            self.isolated,
        )


def moved(value: Any, device: torch.device) -> Any:
    """The value, on `device` where it is a tensor."""
    return value.to(device) if isinstance(value, Tensor) else value


def moved_extra(extra: Extra | None, device: torch.device) -> Extra | None:
    """The extra keys with their tensors on `device`."""
    if extra is None:
        return None
    return {
        n: pair if callable(pair) else (pair[0].to(device), pair[1].to(device)) for n, pair in extra.items()
    }


def made_extra(extra: Extra | None, key: Tensor, value: Tensor) -> Mapping[str, Pair]:
    """The extra keys in the layer's dtype, those that are made of its k and v (batch, keys, heads, head_dim)
    made.
    """
    pairs = {n: pair(key, value) if callable(pair) else pair for n, pair in (extra or {}).items()}
    # Those that a method keeps may be of another dtype than autocast, or a model moved since, has the layer's
    # in.
    return {n: (k.to(key.dtype), v.to(value.dtype)) for n, (k, v) in pairs.items()}


def check_callables(argument: str, holder: object, names: Sequence[str]) -> None:
    for name in names:
        if not callable(given := getattr(holder, name)) and given is not None:
            raise TypeError(f"{argument}.{name}: expected a callable or None, got {type(given).__name__}")


def check_extra(argument: str, extra: Extra | None, control: Control | None) -> None:
    names = control.keys.names if control is not None else ()
    for name, pair in (extra or {}).items():
        if name not in names:
            raise ValueError(
                f"{argument}.extra: {name!r} is no key segment of the control; it has {', '.join(names) or 'none'}"
            )
        is_pair = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)
        if not is_pair and not callable(pair):
            got = type(pair).__name__
            raise TypeError(
                f"{argument}.extra[{name!r}]: expected a pair of tensors (k, v) or a callable, got {got}"
            )


def check_extra_shapes(
    argument: str, extra: Extra | None, control: Control, batch: int, layer: Layer
) -> None:
    if extra and control.keys.items is not None:
        raise ValueError(
            f"{argument}.extra: the control's key segments must be equally long in every item of the batch"
        )
    for name, pair in (extra or {}).items():
        if callable(pair):
            continue
        k, v = pair
        expected = (control.keys.lengths[control.keys.index(name)], layer.heads, layer.head_dim)
        for what, t in (("k", k), ("v", v)):
            if t.dim() != 4 or tuple(t.shape[1:]) != expected or t.shape[0] not in (1, batch):
                raise ValueError(
                    f"{argument}.extra[{name!r}]: expected {what} of shape (1 or {batch}, "
                    f"{', '.join(map(str, expected))}) for layer {layer.index} ({layer.kind}), got {tuple(t.shape)}"
                )


def check_tables(argument: str, control: Control, batch: int, layer: Layer) -> None:
    for what, sizes, have in (("items", control.batches, batch), ("heads", control.heads, layer.heads)):
        if wrong := sizes - {have}:
            raise ValueError(
                f"{argument}: its tables are for {sorted(wrong)} {what}, layer {layer.index} ({layer.kind}) has {have}"
            )


def broadcasts(t: Tensor, full: tuple[int, ...]) -> bool:
    shape = (1,) * (len(full) - t.dim()) + tuple(t.shape)
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

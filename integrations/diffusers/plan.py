"""The method protocol: what a method is told of a layer and a step, and the plan with which it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...bindings import Control


@dataclass(frozen=True)
class Layer:
    """One attention layer during one forward call.

    A method sees the joint sequence as [text ; image] whatever the architecture's own order: attention is
    permutation-equivariant, and a processor joins its streams in this order.

    The kinds differ in their rows and keys: image tokens attend to image tokens in "self", to text in "cross", to
    [text ; image] in "added" (DeepFloyd IF's and Kandinsky's UNets); elsewhere [text ; image] attends to itself.
    """

    index: int  # place among the model's attention layers, in the order of the forward pass
    kind: str  # "double" or "single" (FLUX), "joint" or "self" (SD3), "self", "cross" or "added" (UNet)
    place: str | None  # "down", "mid" or "up" in a UNet, None elsewhere
    heads: int
    head_dim: int
    text_len: int  # text tokens of the layer, padding included; 0 where it is "self"
    image_len: int  # image tokens
    batch: int = 1  # items of the call, both halves of a classifier-free guidance included
    grid: tuple[int, int] | None = None  # (rows, columns) of the image tokens; FLUX: where the handle has been told

    @property
    def rows(self) -> int:
        """The number of tokens that attend."""
        return self.image_len if self.kind in ("self", "cross", "added") else self.text_len + self.image_len

    @property
    def keys(self) -> int:
        """The number of tokens that are attended to."""
        return self.text_len if self.kind == "cross" else self.text_len + self.image_len


@dataclass(frozen=True)
class Step:
    """One denoising step, as far as it is known without asking the GPU."""

    index: int  # 0, 1, ...
    count: int | None = None  # steps of the run
    sigma: float | None = None  # noise level at which the model is evaluated


@dataclass(frozen=True, eq=False)
class Part:
    """Some items of a batch in an attention call of their own.

    The items of one call share its list of keys, softmax groups, contrast and segments. Where they differ in those,
    as where one image of a batch reads the keys of others and contrasts what it reads, each sort of item is a Part: no
    kernel has to know, and K and V stay in place, read by index.

    Args:
        items: the batch items whose output this is; different ones in each part.
        source: {"q": index, "k": index, "v": index}, int tensors (items,): the batch item that each of `items` reads;
            itself where not given. A sequence of indices for k and v: the layer's keys once for each, joined in one
            softmax.
        control: its rows are those of the layer, its keys those of the layer once for each index of k, in that order;
            a key segment lies within one of them. Tables with a batch are for `items`. None: plain.
        scale: as in attention(): a number, or a tensor (items,) or (items, heads).

    Raises:
        TypeError: a field of another type. ValueError: no item, an item twice, a `source` with other keys, of other
            lengths, or with other numbers of k than of v.
    """

    items: Sequence[int]
    source: Mapping[str, Tensor | Sequence[Tensor]] | None = None
    control: Control | None = None
    scale: float | Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.items, Tensor) or not all(isinstance(n, int) and not isinstance(n, bool) for n in self.items):
            raise TypeError(f"Part.items: expected a sequence of ints, got {self.items!r}")
        if not self.items or min(self.items) < 0 or len(set(self.items)) < len(self.items):
            raise ValueError(f"Part.items: expected different batch items, at least one, got {self.items!r}")
        object.__setattr__(self, "items", tuple(self.items))
        if self.control is not None and not isinstance(self.control, Control):
            raise TypeError(f"Part.control: expected a Control or None, got {type(self.control).__name__}")
        if unknown := set(self.source or ()) - {"q", "k", "v"}:
            raise ValueError(f"Part.source: expected the keys q, k and v, got {sorted(map(str, unknown))}")
        if isinstance((self.source or {}).get("q"), Sequence):
            raise TypeError("Part.source['q']: expected one int tensor (items,), got a sequence")
        for name in self.source or ():
            for index in self.indices(name):
                if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
                    got = index.dtype if isinstance(index, Tensor) else type(index).__name__
                    raise TypeError(f"Part.source[{name!r}]: expected int32 or int64 tensors (items,), got {got}")
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
        """What q, k or v are read from: int tensors (items,), one for each time that the layer's tokens are taken."""
        index = (self.source or {}).get(name)
        if index is None:
            index = torch.tensor(self.items)
        return (index,) if isinstance(index, Tensor) else tuple(index)

    def check(self, layer: Layer) -> None:
        """ValueError where the part does not fit the layer: items, token counts, batch, heads."""
        where = f"layer {layer.index} ({layer.kind})"
        if max(self.items) >= layer.batch:
            raise ValueError(f"Part.items: expected items below the batch of {layer.batch} in {where}, got {self.items}")
        for name in ("q", "k", "v"):
            for index in self.indices(name):
                low, high = (int(index.min()), int(index.max())) if index.device.type == "cpu" else (0, 0)
                if low < 0 or high >= layer.batch:
                    raise ValueError(
                        f"Part.source[{name!r}]: expected items in 0..{layer.batch - 1} for {where}, got {index.tolist()}"
                    )
        if self.control is None:
            return
        _check_tables("Part.control", self.control, len(self.items), layer)
        times, keys = len(self.indices("k")), self.control.keys
        for name, total, expected in (
            ("rows", self.control.rows.total, layer.rows),
            ("keys", keys.total, times * layer.keys),
        ):
            if total != expected:
                raise ValueError(f"Part.control.{name}: {total} tokens for {where}, expected {expected}")
        if times > 1 and keys.items is not None:
            raise ValueError("Part.control: its key segments must be equally long in every item of the batch")
        start = 0
        for name, length in zip(keys.names, keys.lengths, strict=True):
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
            self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale,
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """What to do in one attention layer; Plan() is plain attention.

    The processor normalises q and k of each stream, joins them as [text ; image], adds `q_offset` and `k_offset`,
    applies RoPE, calls `query` and `value`, and then flashbrush.attention with the rest; see Layer for rows and keys.

    Args:
        control: tables whose rows, and whose keys other than those in `extra`, cover the layer's in order.
        source: as in attention(): {"q": index, "k": index, "v": index}, int tensors (batch,).
        extra: {key segment of the control: (k, v)}: keys that no token of the layer provides (registers, cached
            references), each (1 or batch, length, heads, head_dim) in the model's dtype, used as they are: without
            norm or RoPE. They are read in place.
        q_offset, k_offset: added after the norm and before RoPE; broadcastable to (batch, rows, heads, head_dim) and
            (batch, keys, heads, head_dim).
        query: maps q (batch, rows, heads, head_dim) after RoPE to a tensor of the same shape.
        value: the same for v (batch, keys, heads, head_dim).
        scale: logit scale as in attention(); None: 1/sqrt(head_dim). With a temperature tau: 1/(tau*sqrt(head_dim)).
        order: int64 (tokens,) or (batch, tokens), of a layer whose tokens attend to themselves: the control's i-th row and
            key is token order[i] of [text ; image], as Segments.from_labels sorts interleaved segments. Gates and
            statistics are in that order, offsets, transforms and the output in the layer's own.
        parts: items of the batch that get a call of their own. `control`, `source`, `extra` and `scale` are then those
            of the remaining items, and their batch is the number of these; offsets and transforms are for all items.

    Raises:
        TypeError: a field of another type. ValueError: `extra` without a control that names its segments, a `source`
            with other keys than q, k and v, an item in two parts, an `order` together with parts, or one for each item
            together with a `source`.
    """

    control: Control | None = None
    source: Mapping[str, Tensor] | None = None
    extra: Mapping[str, tuple[Tensor, Tensor]] | None = None
    q_offset: Tensor | None = None
    k_offset: Tensor | None = None
    query: Callable[[Tensor], Tensor] | None = None
    value: Callable[[Tensor], Tensor] | None = None
    scale: float | Tensor | None = None
    order: Tensor | None = None
    parts: Sequence[Part] = ()

    def __post_init__(self) -> None:
        if self.control is not None and not isinstance(self.control, Control):
            raise TypeError(f"Plan.control: expected a Control or None, got {type(self.control).__name__}")
        if unknown := set(self.source or ()) - {"q", "k", "v"}:
            raise ValueError(f"Plan.source: expected the keys q, k and v, got {sorted(map(str, unknown))}")
        for name, index in (self.source or {}).items():
            if not isinstance(index, Tensor):
                raise TypeError(f"Plan.source[{name!r}]: expected an int tensor (batch,), got {type(index).__name__}")
        for name in ("q_offset", "k_offset"):
            if not isinstance(offset := getattr(self, name), Tensor | None):
                raise TypeError(f"Plan.{name}: expected a tensor or None, got {type(offset).__name__}")
        for name in ("query", "value"):
            if not callable(transform := getattr(self, name)) and transform is not None:
                raise TypeError(f"Plan.{name}: expected a callable or None, got {type(transform).__name__}")
        for name, pair in (self.extra or {}).items():
            names = self.control.keys.names if self.control is not None else ()
            if name not in names:
                raise ValueError(
                    f"Plan.extra: {name!r} is no key segment of the control; it has {', '.join(names) or 'none'}"
                )
            if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
                raise TypeError(f"Plan.extra[{name!r}]: expected a pair of tensors (k, v), got {type(pair).__name__}")
        if (order := self.order) is not None:
            if not isinstance(order, Tensor) or order.dtype != torch.int64:
                got = order.dtype if isinstance(order, Tensor) else type(order).__name__
                raise TypeError(f"Plan.order: expected an int64 tensor (tokens,) or (batch, tokens), got {got}")
            if self.parts or (self.source and order.dim() == 2):
                raise ValueError("Plan.order: expected none together with parts, nor one for each item with a source")
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if not isinstance(part, Part):
                raise TypeError(f"Plan.parts: expected Part objects, got {type(part).__name__}")
        items = [n for part in self.parts for n in part.items]
        if twice := sorted({n for n in items if items.count(n) > 1}):
            raise ValueError(f"Plan.parts: items {twice} are in more than one part")

    @property
    def controls(self) -> list[Control]:
        """The controls of all calls."""
        return [c for c in (self.control, *(part.control for part in self.parts)) if c is not None]

    def rest(self, batch: int) -> tuple[int, ...]:
        """The items of the batch that are in no part."""
        taken = {n for part in self.parts for n in part.items}
        return tuple(n for n in range(batch) if n not in taken)

    def check(self, layer: Layer) -> None:
        """ValueError where the plan does not fit the layer: token counts, batch, heads, shapes of extra keys."""
        where = f"layer {layer.index} ({layer.kind})"
        for part in self.parts:
            part.check(layer)
        batch = len(self.rest(layer.batch))
        if not batch and (self.control is not None or self.source is not None or self.scale is not None):
            raise ValueError(f"Plan: its parts take all {layer.batch} items of {where}; control, source and scale have none")
        if (control := self.control) is not None:
            own = control.keys.total - sum(control.keys.lengths[control.keys.index(n)] for n in self.extra or ())
            for name, total, expected in (("rows", control.rows.total, layer.rows), ("keys", own, layer.keys)):
                if total != expected:
                    raise ValueError(
                        f"Plan.control.{name}: {total} tokens for {where}, which has {layer.text_len} of text and "
                        f"{layer.image_len} of image, {expected} as {name}"
                    )
            _check_tables("Plan.control", control, batch, layer)
            if self.extra and control.keys.items is not None:
                raise ValueError("Plan.extra: the control's key segments must be equally long in every item of the batch")
        if (order := self.order) is not None:
            if layer.kind in ("cross", "added") or tuple(order.shape) not in ((layer.rows,), (layer.batch, layer.rows)):
                raise ValueError(
                    f"Plan.order: expected a layer whose tokens attend to themselves, and a shape of ({layer.rows},) or "
                    f"({layer.batch}, {layer.rows}) there, got {tuple(order.shape)} for {where}"
                )
        for name, (k, v) in (self.extra or {}).items():
            assert control is not None
            expected = (control.keys.lengths[control.keys.index(name)], layer.heads, layer.head_dim)
            for what, t in (("k", k), ("v", v)):
                if t.dim() != 4 or tuple(t.shape[1:]) != expected or t.shape[0] not in (1, batch):
                    raise ValueError(
                        f"Plan.extra[{name!r}]: expected {what} of shape (1 or {batch}, "
                        f"{', '.join(map(str, expected))}) for {where}, got {tuple(t.shape)}"
                    )
        for name, tokens in (("q_offset", layer.rows), ("k_offset", layer.keys)):
            full = (layer.batch, tokens, layer.heads, layer.head_dim)
            if (offset := getattr(self, name)) is not None and not _broadcasts(offset, full):
                raise ValueError(f"Plan.{name}: expected a shape broadcastable to {full} for {where}, "
                                 f"got {tuple(offset.shape)}")  # fmt: skip
        for name, index in (self.source or {}).items():
            if index.shape != (batch,):
                raise ValueError(f"Plan.source[{name!r}]: expected shape ({batch},) for {where}, got {tuple(index.shape)}")

    def to(self, device: torch.device) -> Plan:
        """This plan with its tensors on `device`; the same object where they are there already."""

        def moved(t):
            return t.to(device) if isinstance(t, Tensor) else t

        control = None if self.control is None else self.control.to(device)
        others = [self.q_offset, self.k_offset, self.scale, self.order, *(self.source or {}).values()]
        others += [t for pair in (self.extra or {}).values() for t in pair]
        if control is self.control and not self.parts and all(moved(t) is t for t in others):
            return self
        return Plan(
            control=control,
            source=None if self.source is None else {n: t.to(device) for n, t in self.source.items()},
            extra=None if self.extra is None else {n: (k.to(device), v.to(device)) for n, (k, v) in self.extra.items()},
            q_offset=moved(self.q_offset),
            k_offset=moved(self.k_offset),
            query=self.query,
            value=self.value,
            scale=moved(self.scale),
            order=moved(self.order),
            parts=[part.to(device) for part in self.parts],
        )


@runtime_checkable
class Method(Protocol):
    """A published method: its knobs, and a plan for each layer and step.

    `plan` runs outside of every compiled region, once per layer and forward call, and must not wait for the GPU.
    Equal tables should come back as the same Control, which keeps them on the device. None: plain attention.
    """

    def plan(self, layer: Layer, step: Step) -> Plan | None: ...


def _check_tables(argument: str, control: Control, batch: int, layer: Layer) -> None:
    for what, sizes, have in (("items", control.batches, batch), ("heads", control.heads, layer.heads)):
        if wrong := sizes - {have}:
            raise ValueError(
                f"{argument}: its tables are for {sorted(wrong)} {what}, layer {layer.index} ({layer.kind}) has {have}"
            )


def _broadcasts(t: Tensor, full: tuple[int, ...]) -> bool:
    shape = (1,) * (len(full) - t.dim()) + tuple(t.shape)
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))

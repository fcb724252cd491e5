"""The method protocol: the plan with which a method answers for a layer and a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ....bindings import Control, attention, column_mass, key_probabilities
from .batch_call import (
    Extra,
    Part,
    broadcasts,
    check_callables,
    check_extra,
    check_extra_shapes,
    check_tables,
    moved,
    moved_extra,
)
from .layer import Layer, Step


class Seen:
    """What one layer attends with in one call, given to Plan.see: maps without a map, and keys to keep.

    Attributes:
        q: (batch, rows, heads, head_dim); k, v: (batch, keys, heads, head_dim): normalised, with offsets and
            RoPE, before Plan.query, Plan.value and Plan.order.
        again: whether a backward pass with gradient checkpointing runs the layer once more.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None, again: bool = False
    ) -> None:
        self.q, self.k, self.v, self.again = q, k, v, again
        if lse is not None:
            self.lse = lse

    @cached_property
    def lse(self) -> Tensor:
        """Of plain attention, (batch, heads, rows, 1) float32. Free where the plan leaves attention plain."""
        with torch.no_grad():
            return attention(self.q, self.k, self.v, return_stats=True)[1].lse

    def probabilities(self, keys: Sequence[int] | Tensor) -> Tensor:
        """Plain attention's map at some keys, (batch, heads, rows, len(keys)) float32; has its gradient."""
        return key_probabilities(self.q, self.k, self.lse, keys)

    def column_mass(self) -> Tensor:
        """Plain attention's map summed over the rows, (batch, heads, keys) float32."""
        return column_mass(self.q, self.k, self.lse)


@dataclass(frozen=True, eq=False)
class Plan:
    """What to do in one attention layer; Plan() is plain attention.

    The processor calls `hidden`, projects, normalises q and k of each stream, joins them as [text ; image],
    adds `q_offset` and `k_offset`, applies RoPE, calls `query` and `value`, and then flashbrush.attention
    with the rest; see Layer for rows and keys. A callable is not for a region that is compiled with
    fullgraph=True.

    Args:
        control: tables whose rows, and whose keys other than those in `extra`, cover the layer's in order.
        source: as in attention(): {"q": index, "k": index, "v": index}, int tensors (batch,).
        extra: {key segment of the control: (k, v)}: keys that no token of the layer provides (registers,
            cached references), each (1 or batch, length, heads, head_dim), used as they are: without norm or
            RoPE. In the layer's dtype they are read in place, else cast. In place of the pair a callable that
            makes it of the layer's k and v (batch, keys, heads, head_dim), after RoPE and `value`, before
            `order`, as for a copy at another position.
        q_offset, k_offset: added after the norm and before RoPE; broadcastable to (batch, rows, heads,
            head_dim) and (batch, keys, heads, head_dim).
        query: maps q (batch, rows, heads, head_dim) after RoPE to a tensor of the same shape.
        value: the same for v (batch, keys, heads, head_dim).
        scale: logit scale as in attention(); None: 1/sqrt(head_dim). With a temperature tau:
            1/(tau*sqrt(head_dim)).
        order: int64 (rows,) or (batch, rows): the control's i-th row is token order[i] of [text ; image], as
            Segments.from_labels sorts interleaved segments, and so is its i-th key where tokens attend to
            themselves (in "cross" the keys are the text as it is). Gates and statistics are in that order,
            offsets, transforms and the output in the layer's own.
        parts: items of the batch that get calls of their own. `control`, `source`, `extra` and `scale` are
            then those of the remaining items, and their batch is the number of these; offsets and transforms
            are for all items.
        hidden: maps the hidden states that q, k and v of the image are projected from, (batch, image tokens,
            channels), in "single" layers those of [text ; image], to a tensor of the same shape.
        see: is called with a Seen, after the attention.
        late: is called when the forward pass reaches the layer, where what earlier layers saw in the same
            call decides; the plan that it returns is followed instead of this one. Alone.

    Raises:
        TypeError: a field of another type. ValueError: `extra` without a control that names its segments, a
            `source` with other keys than q, k and v, an `order` together with parts, or one for each item
            together with a `source`; `late` together with another field.
    """

    control: Control | None = None
    source: Mapping[str, Tensor] | None = None
    extra: Extra | None = None
    q_offset: Tensor | None = None
    k_offset: Tensor | None = None
    query: Callable[[Tensor], Tensor] | None = None
    value: Callable[[Tensor], Tensor] | None = None
    scale: float | Tensor | None = None
    order: Tensor | None = None
    parts: Sequence[Part] = ()
    hidden: Callable[[Tensor], Tensor] | None = None
    see: Callable[[Seen], None] | None = None
    late: Callable[[], Plan | None] | None = None

    def __post_init__(self) -> None:
        if self.control is not None and not isinstance(self.control, Control):
            raise TypeError(f"Plan.control: expected a Control or None, got {type(self.control).__name__}")
        if unknown := set(self.source or ()) - {"q", "k", "v"}:
            raise ValueError(f"Plan.source: expected the keys q, k and v, got {sorted(map(str, unknown))}")
        for name, index in (self.source or {}).items():
            if not isinstance(index, Tensor):
                raise TypeError(
                    f"Plan.source[{name!r}]: expected an int tensor (batch,), got {type(index).__name__}"
                )
        for name in ("q_offset", "k_offset"):
            if not isinstance(offset := getattr(self, name), Tensor | None):
                raise TypeError(f"Plan.{name}: expected a tensor or None, got {type(offset).__name__}")
        check_callables("Plan", self, ("query", "value", "hidden", "see", "late"))
        others = [
            f.name
            for f in fields(self)
            if f.name not in ("late", "parts") and getattr(self, f.name) is not None
        ]
        if self.late is not None and (others or self.parts):
            raise ValueError(
                f"Plan.late: expected no other field beside it, got {', '.join(others) or 'parts'}"
            )
        check_extra("Plan", self.extra, self.control)
        if (order := self.order) is not None:
            if not isinstance(order, Tensor) or order.dtype != torch.int64:
                got = order.dtype if isinstance(order, Tensor) else type(order).__name__
                raise TypeError(f"Plan.order: expected an int64 tensor (rows,) or (batch, rows), got {got}")
            if self.parts or (self.source and order.dim() == 2):
                raise ValueError(
                    "Plan.order: expected none together with parts, nor one for each item with a source"
                )
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if not isinstance(part, Part):
                raise TypeError(f"Plan.parts: expected Part objects, got {type(part).__name__}")

    @property
    def controls(self) -> list[Control]:
        """The controls of all calls."""
        return [c for c in (self.control, *(part.control for part in self.parts)) if c is not None]

    @property
    def is_plain(self) -> bool:
        """Whether the attention itself is left as it is."""
        changes = (self.control, self.source, self.query, self.value, self.scale, self.order)
        return not self.parts and all(change is None for change in changes)

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
            raise ValueError(
                f"Plan: its parts take all {layer.batch} items of {where}; control, source and scale have none"
            )
        if (control := self.control) is not None:
            own = control.keys.total - sum(
                control.keys.lengths[control.keys.index(n)] for n in self.extra or ()
            )
            for name, total, expected in (
                ("rows", control.rows.total, layer.rows),
                ("keys", own, layer.keys),
            ):
                if total != expected:
                    raise ValueError(
                        f"Plan.control.{name}: {total} tokens for {where}, which has {layer.text_len} of text and "
                        f"{layer.image_len} of image, {expected} as {name}"
                    )
            check_tables("Plan.control", control, batch, layer)
            check_extra_shapes("Plan", self.extra, control, batch, layer)
        if (order := self.order) is not None:
            if layer.kind == "added" or tuple(order.shape) not in ((layer.rows,), (layer.batch, layer.rows)):
                raise ValueError(
                    f"Plan.order: expected a layer without added keys, and a shape of ({layer.rows},) or ({layer.batch}, "
                    f"{layer.rows}) there, got {tuple(order.shape)} for {where}"
                )
        for name, tokens in (("q_offset", layer.rows), ("k_offset", layer.keys)):
            full = (layer.batch, tokens, layer.heads, layer.head_dim)
            if (offset := getattr(self, name)) is not None and not broadcasts(offset, full):
                raise ValueError(
                    f"Plan.{name}: expected a shape broadcastable to {full} for {where}, "
                    f"got {tuple(offset.shape)}"
                )
        for name, index in (self.source or {}).items():
            if index.shape != (batch,):
                raise ValueError(
                    f"Plan.source[{name!r}]: expected shape ({batch},) for {where}, got {tuple(index.shape)}"
                )

    def to(self, device: torch.device) -> Plan:
        """This plan with its tensors on `device`; the same object where they are there already."""
        control = None if self.control is None else self.control.to(device)
        others = [self.q_offset, self.k_offset, self.scale, self.order, *(self.source or {}).values()]
        others += [t for pair in (self.extra or {}).values() if not callable(pair) for t in pair]
        if control is self.control and not self.parts and all(moved(t, device) is t for t in others):
            return self
        return replace(
            self,
            control=control,
            source=None if self.source is None else {n: t.to(device) for n, t in self.source.items()},
            extra=moved_extra(self.extra, device),
            q_offset=moved(self.q_offset, device),
            k_offset=moved(self.k_offset, device),
            scale=moved(self.scale, device),
            order=moved(self.order, device),
            parts=[part.to(device) for part in self.parts],
        )


@runtime_checkable
class Method(Protocol):
    """A published method: its knobs, and a plan for each layer and step.

    `plan` runs outside of every compiled region, once per layer and forward call, and must not wait for the
    GPU. Equal tables should come back as the same Control, which keeps them on the device. None: plain
    attention.

    A method that also changes something outside of the attention has a second function, `attach(model)`:
    apply() calls it with the model, and removes the hooks that it returns, objects with remove(), together
    with the control. Such a method controls one model at a time.
    """

    def plan(self, layer: Layer, step: Step) -> Plan | None: ...

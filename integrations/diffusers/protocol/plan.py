"""The method protocol: Method.plan(layer, step) returns a Plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ....bindings import Control, attention, column_mass, key_probabilities
from .batch_call import Part
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
from .layer import Layer, Step


class Seen:
    """What Plan.see receives: q, k and v of one layer in one call, and columns of its map without the map.

    Attributes:
        q: (batch, rows, heads, head_dim), normalised, with offset and RoPE, before Plan.query and Plan.order.
        k: (batch, keys, heads, head_dim), likewise.
        v: (batch, keys, heads, head_dim), before Plan.value and Plan.order.
        again: True where a backward pass with gradient checkpointing runs the layer a second time: do not
            count it twice.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None, again: bool = False
    ) -> None:
        self.q, self.k, self.v, self.again = q, k, v, again
        if lse is not None:
            self.lse = lse

    @cached_property
    def lse(self) -> Tensor:
        """lse of plain attention, (batch, heads, rows, 1) float32.

        Free where the plan leaves attention plain, else one more attention call.
        """
        with torch.no_grad():
            return attention(self.q, self.k, self.v, return_stats=True)[1].lse

    def probabilities(self, keys: Sequence[int] | Tensor) -> Tensor:
        """Columns of plain attention's map, (batch, heads, rows, len(keys)) float32; differentiable."""
        return key_probabilities(self.q, self.k, self.lse, keys)

    def column_mass(self) -> Tensor:
        """Plain attention's map summed over its rows, (batch, heads, keys) float32."""
        return column_mass(self.q, self.k, self.lse)


@dataclass(frozen=True, eq=False)
class Plan:
    """What to do in one attention layer; Plan() is plain attention.

    Order of a call: `hidden`; projections; norms of q and k; streams joined as [text ; image]; `q_offset` and
    `k_offset`; RoPE; `query` and `value`; flashbrush.attention with the other fields; `see`. plan_call.py
    executes it. torch.compile with fullgraph=True may refuse a callable.

    Args:
        control: its rows are the layer's rows; its keys are the layer's keys in order, and those in `extra`.
        source: as in attention(): {"q": index, "k": index, "v": index}, int tensors (batch,).
        extra: {key segment of the control: (k, v)}: keys that are no tokens of the layer, such as registers
            or cached references, each (1 or batch, length, heads, head_dim). They get neither norm nor RoPE,
            and are read in place in the layer's dtype, else cast. A callable in place of the pair makes it
            from the layer's k and v (batch, keys, heads, head_dim), after RoPE and `value`, before `order`.
        q_offset: added to q between norm and RoPE; broadcasts to (batch, rows, heads, head_dim).
        k_offset: added to k between norm and RoPE; broadcasts to (batch, keys, heads, head_dim).
        query: maps q (batch, rows, heads, head_dim), after RoPE, to a tensor of the same shape.
        value: maps v (batch, keys, heads, head_dim) to a tensor of the same shape.
        scale: logit scale as in attention(); None: 1/sqrt(head_dim). A temperature tau is
            1 / (tau * sqrt(head_dim)).
        order: int64 (rows,) or (batch, rows): row i of the control is token order[i] of [text ; image], as
            Segments.from_labels sorts interleaved segments. The keys are sorted the same way, except in
            "cross". Gates and statistics follow this order; offsets, transforms and the output keep the
            layer's.
        parts: batch items with calls of their own. `control`, `source`, `extra` and `scale` are then for the
            remaining items; offsets and transforms for all.
        hidden: maps the hidden states that the image's q, k and v are projected from, (batch, image tokens,
            channels), in "single" layers (batch, [text ; image] tokens, channels), to a tensor of the same
            shape.
        see: called with a Seen after the attention.

    Raises:
        TypeError: a field of another type.
        ValueError: `extra` without a control that names its segments; a `source` with other keys than q, k
            and v; an `order` together with parts, or one per item together with a `source`.

    Examples:
        Image tokens give the prompt 1.5 times the weight:

        >>> import flashbrush as fb
        >>> from flashbrush.integrations.diffusers import Plan
        >>> tokens = fb.Segments(prompt=512, image=4096)
        >>> plan = Plan(fb.Control(tokens, weight={("image", "prompt"): 1.5}))
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

    def __post_init__(self) -> None:
        check_control("Plan", self.control)
        check_source_names("Plan", self.source)
        for name, index in (self.source or {}).items():
            if not isinstance(index, Tensor):
                raise TypeError(
                    f"Plan.source[{name!r}]: expected an int tensor (batch,), got {type(index).__name__}"
                )
        for name in ("q_offset", "k_offset"):
            if not isinstance(offset := getattr(self, name), Tensor | None):
                raise TypeError(f"Plan.{name}: expected a tensor or None, got {type(offset).__name__}")
        check_callables("Plan", self, ("query", "value", "hidden", "see"))
        check_extra("Plan", self.extra, self.control)
        if (order := self.order) is not None:
            if not isinstance(order, Tensor) or order.dtype != torch.int64:
                got = order.dtype if isinstance(order, Tensor) else type(order).__name__
                raise TypeError(f"Plan.order: expected an int64 tensor (rows,) or (batch, rows), got {got}")
            if self.parts or (self.source and order.dim() == 2):
                raise ValueError(
                    "Plan.order: expected none together with parts, nor one per item together with a source"
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
        """Whether the attention itself is plain: see, hidden and offsets do not count."""
        changes = (self.control, self.source, self.query, self.value, self.scale, self.order)
        return not self.parts and all(change is None for change in changes)

    def rest(self, batch: int) -> tuple[int, ...]:
        """The items of the batch that are in no part."""
        taken = {n for part in self.parts for n in part.items}
        return tuple(n for n in range(batch) if n not in taken)

    def check(self, layer: Layer) -> None:
        """Raises ValueError if the plan does not fit the layer: token counts, batch, heads, extra keys."""
        where = f"layer {layer.index} ({layer.kind})"
        for part in self.parts:
            part.check(layer)
        batch = len(self.rest(layer.batch))
        if not batch and (self.control is not None or self.source is not None or self.scale is not None):
            raise ValueError(
                f"Plan: its parts take all {layer.batch} items of {where}; no item is left for its control, "
                "source and scale"
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
                        f"Plan.control.{name}: {total} tokens for {where}, which has {layer.text_len} of "
                        f"text and {layer.image_len} of image, {expected} as {name}"
                    )
            check_tables("Plan.control", control, batch, layer)
            check_extra_shapes("Plan", self.extra, control, batch, layer)
        if (order := self.order) is not None:
            if layer.kind == "added" or tuple(order.shape) not in ((layer.rows,), (layer.batch, layer.rows)):
                raise ValueError(
                    f"Plan.order: expected a layer without added keys, and a shape of ({layer.rows},) or "
                    f"({layer.batch}, {layer.rows}) there, got {tuple(order.shape)} for {where}"
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


LatePlan = Callable[[], Plan | None]


@runtime_checkable
class Method(Protocol):
    """A published method: an object with its knobs and ``plan(layer, step) -> Plan | None``.

    `plan` runs outside every compiled region, once per layer and forward call, and must not wait for the GPU.
    None is plain attention. Return the same Plan object where nothing changed: its tables then stay on the
    device. `plan` may also return a function without arguments, which the layer calls when the forward pass
    reaches it and which returns the Plan or None: for a plan that depends on what `see` of an earlier layer
    got in the same call.

    A method that also changes the model outside its attention has a second function ``attach(model)``, which
    returns the hooks that it registered (objects with remove()). apply() calls it, and removes the hooks with
    the control. Such a method controls one model at a time.
    """

    def plan(self, layer: Layer, step: Step) -> Plan | LatePlan | None: ...


def check_method(method: object) -> None:
    """TypeError unless it is None or an object with plan()."""
    if isinstance(method, type) or not (method is None or isinstance(method, Method)):
        got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise TypeError(f"method: expected an object with plan(layer, step) or None, got {got}")

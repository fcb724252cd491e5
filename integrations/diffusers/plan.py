"""The method protocol: what a method is told of a layer and a step, and the plan with which it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """

    index: int  # place among the model's attention layers, in the order of the forward pass
    kind: str  # "double" or "single" (FLUX), "self" or "cross" (UNet), "joint" (SD3)
    place: str | None  # "down", "mid" or "up" in a UNet, None elsewhere
    heads: int
    head_dim: int
    text_len: int  # text tokens of the joint sequence, padding included
    image_len: int  # image tokens
    batch: int = 1  # items of the call, both halves of a classifier-free guidance included
    grid: tuple[int, int] | None = None  # (rows, columns) of the image tokens, where the handle has been told


@dataclass(frozen=True)
class Step:
    """One denoising step, as far as it is known without asking the GPU."""

    index: int  # 0, 1, ...
    count: int | None = None  # steps of the run
    sigma: float | None = None  # noise level at which the model is evaluated


@dataclass(frozen=True, eq=False)
class Plan:
    """What to do in one attention call; Plan() is plain attention.

    The processor normalises q and k of each stream, joins them as [text ; image], adds `q_offset` and `k_offset`,
    applies RoPE, calls `query` and `value`, and then flashbrush.attention with the rest. tokens = text_len + image_len.

    Args:
        control: tables whose rows, and whose keys other than those in `extra`, cover the tokens in order.
        source: as in attention(): {"q": index, "k": index, "v": index}, int tensors (batch,).
        extra: {key segment of the control: (k, v)}: keys that no token of the layer provides (registers, cached
            references), each (1 or batch, length, heads, head_dim) in the model's dtype, used as they are: without
            norm or RoPE. They are read in place.
        q_offset, k_offset: added after the norm and before RoPE; broadcastable to (batch, tokens, heads, head_dim).
        query: maps q (batch, tokens, heads, head_dim) after RoPE to a tensor of the same shape.
        value: the same for v.

    Raises:
        TypeError: a field of another type. ValueError: `extra` without a control that names its segments, a `source`
            with other keys than q, k and v.
    """

    control: Control | None = None
    source: Mapping[str, Tensor] | None = None
    extra: Mapping[str, tuple[Tensor, Tensor]] | None = None
    q_offset: Tensor | None = None
    k_offset: Tensor | None = None
    query: Callable[[Tensor], Tensor] | None = None
    value: Callable[[Tensor], Tensor] | None = None

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

    def check(self, layer: Layer) -> None:
        """ValueError where the plan does not fit the layer: token counts, batch, heads, shapes of extra keys."""
        tokens, where = layer.text_len + layer.image_len, f"layer {layer.index} ({layer.kind})"
        if (control := self.control) is not None:
            own = control.keys.total - sum(control.keys.lengths[control.keys.index(n)] for n in self.extra or ())
            for name, total in (("rows", control.rows.total), ("keys", own)):
                if total != tokens:
                    raise ValueError(
                        f"Plan.control.{name}: {total} tokens for {where}, which has {layer.text_len} of text and "
                        f"{layer.image_len} of image"
                    )
            for what, sizes, have in (("items", control.batches, layer.batch), ("heads", control.heads, layer.heads)):
                if wrong := sizes - {have}:
                    raise ValueError(f"Plan.control: its tables are for {sorted(wrong)} {what}, {where} has {have}")
            if self.extra and control.keys.items is not None:
                raise ValueError("Plan.extra: the control's key segments must be equally long in every item of the batch")
        for name, (k, v) in (self.extra or {}).items():
            assert control is not None
            expected = (control.keys.lengths[control.keys.index(name)], layer.heads, layer.head_dim)
            for what, t in (("k", k), ("v", v)):
                if t.dim() != 4 or tuple(t.shape[1:]) != expected or t.shape[0] not in (1, layer.batch):
                    raise ValueError(
                        f"Plan.extra[{name!r}]: expected {what} of shape (1 or {layer.batch}, "
                        f"{', '.join(map(str, expected))}) for {where}, got {tuple(t.shape)}"
                    )
        full = (layer.batch, tokens, layer.heads, layer.head_dim)
        for name in ("q_offset", "k_offset"):
            if (offset := getattr(self, name)) is not None and not _broadcasts(offset, full):
                raise ValueError(f"Plan.{name}: expected a shape broadcastable to {full} for {where}, "
                                 f"got {tuple(offset.shape)}")  # fmt: skip
        for name, index in (self.source or {}).items():
            if index.shape != (layer.batch,):
                raise ValueError(f"Plan.source[{name!r}]: expected shape ({layer.batch},) for {where}, got {tuple(index.shape)}")

    def to(self, device: torch.device) -> Plan:
        """This plan with its tensors on `device`; the same object where they are there already."""

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        control = None if self.control is None else self.control.to(device)
        others = [self.q_offset, self.k_offset, *(self.source or {}).values()]
        others += [t for pair in (self.extra or {}).values() for t in pair]
        if control is self.control and all(t is None or t.device == device for t in others):
            return self
        return Plan(
            control=control,
            source=None if self.source is None else {n: t.to(device) for n, t in self.source.items()},
            extra=None if self.extra is None else {n: (k.to(device), v.to(device)) for n, (k, v) in self.extra.items()},
            q_offset=moved(self.q_offset),
            k_offset=moved(self.k_offset),
            query=self.query,
            value=self.value,
        )


@runtime_checkable
class Method(Protocol):
    """A published method: its knobs, and a plan for each layer and step.

    `plan` runs outside of every compiled region, once per layer and forward call, and must not wait for the GPU.
    Equal tables should come back as the same Control, which keeps them on the device. None: plain attention.
    """

    def plan(self, layer: Layer, step: Step) -> Plan | None: ...


def _broadcasts(t: Tensor, full: tuple[int, ...]) -> bool:
    shape = (1,) * (len(full) - t.dim()) + tuple(t.shape)
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))

"""Fields that Plan and Part have in common: their types, their checks, and their move to a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....bindings import Control
from .layer import Layer

Pair = tuple[Tensor, Tensor]  # k, v
Extra = Mapping[
    str, Pair | Callable[[Tensor, Tensor], Pair]
]  # {key segment: (k, v) or a function of the layer's}


def moved(value: Any, device: torch.device) -> Any:
    """The value; a tensor on `device`."""
    return value.to(device) if isinstance(value, Tensor) else value


def moved_extra(extra: Extra | None, device: torch.device) -> Extra | None:
    """The extra keys with their tensors on `device`."""
    if extra is None:
        return None
    return {
        n: pair if callable(pair) else (pair[0].to(device), pair[1].to(device)) for n, pair in extra.items()
    }


def check_control(owner: str, control: object) -> None:
    """TypeError unless it is a Control or None. owner: "Plan" or "Part", for the message."""
    if control is not None and not isinstance(control, Control):
        raise TypeError(f"{owner}.control: expected a Control or None, got {type(control).__name__}")


def check_callables(owner: str, holder: object, names: Sequence[str]) -> None:
    """TypeError where one of these fields is neither a callable nor None."""
    for name in names:
        if not callable(given := getattr(holder, name)) and given is not None:
            raise TypeError(f"{owner}.{name}: expected a callable or None, got {type(given).__name__}")


def check_source_names(owner: str, source: Mapping[str, object] | None) -> None:
    """ValueError for other keys than q, k and v."""
    if unknown := set(source or ()) - {"q", "k", "v"}:
        raise ValueError(f"{owner}.source: expected the keys q, k and v, got {sorted(map(str, unknown))}")


def check_extra(owner: str, extra: Extra | None, control: Control | None) -> None:
    """ValueError for a name that is no key segment of the control; TypeError for no pair of tensors."""
    names = control.keys.names if control is not None else ()
    for name, pair in (extra or {}).items():
        if name not in names:
            raise ValueError(
                f"{owner}.extra: {name!r} is no key segment of the control; it has "
                f"{', '.join(names) or 'none'}"
            )
        is_pair = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)
        if not is_pair and not callable(pair):
            got = type(pair).__name__
            raise TypeError(
                f"{owner}.extra[{name!r}]: expected a pair of tensors (k, v) or a callable, got {got}"
            )


def check_extra_shapes(owner: str, extra: Extra | None, control: Control, batch: int, layer: Layer) -> None:
    """ValueError where extra keys do not fit the layer. batch: items of the call that reads them."""
    if extra and control.keys.items is not None:
        raise ValueError(
            f"{owner}.extra: the control's key segments must be equally long in every item of the batch"
        )
    for name, pair in (extra or {}).items():
        if callable(pair):
            continue
        k, v = pair
        expected = (control.keys.lengths[control.keys.index(name)], layer.heads, layer.head_dim)
        for what, t in (("k", k), ("v", v)):
            if t.dim() != 4 or tuple(t.shape[1:]) != expected or t.shape[0] not in (1, batch):
                raise ValueError(
                    f"{owner}.extra[{name!r}]: expected {what} of shape (1 or {batch}, "
                    f"{', '.join(map(str, expected))}) for layer {layer.index} ({layer.kind}), got "
                    f"{tuple(t.shape)}"
                )


def check_tables(owner: str, control: Control, batch: int, layer: Layer) -> None:
    """ValueError for tables of another number of items or heads."""
    for what, sizes, have in (("items", control.batches, batch), ("heads", control.heads, layer.heads)):
        if wrong := sizes - {have}:
            raise ValueError(
                f"{owner}: its tables are for {sorted(wrong)} {what}, "
                f"layer {layer.index} ({layer.kind}) has {have}"
            )


def broadcasts(t: Tensor, full: tuple[int, ...]) -> bool:
    """Whether t's shape broadcasts to `full`."""
    shape = (1,) * (len(full) - t.dim()) + tuple(t.shape)
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))

"""The arguments of apply() that choose: layers, steps, statistics and the backend."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from ...bindings import Stats, backends
from .hosts.host import Place


def select_layers(layers: str | int | Iterable[str | int] | None, places: list[Place]) -> frozenset[int]:
    if layers is None:
        return frozenset(range(len(places)))
    if isinstance(layers, (str, int)):
        layers = [layers]
    kinds = list(
        dict.fromkeys(name for place in places for name in (place.kind, place.place) if name is not None)
    )
    chosen: set[int] = set()
    for entry in layers:
        if isinstance(entry, str):
            if entry not in kinds:
                raise ValueError(f"layers: expected one of {', '.join(kinds)} or an index, got {entry!r}")
            chosen |= {i for i, place in enumerate(places) if entry in (place.kind, place.place)}
        elif isinstance(entry, bool) or not isinstance(entry, int):
            raise ValueError(f"layers: expected a kind or an index, got {entry!r}")
        elif not 0 <= entry < len(places):
            raise ValueError(f"layers: expected indices in 0..{len(places) - 1}, got {entry}")
        else:
            chosen.add(entry)
    if not chosen:
        raise ValueError("layers: expected at least one, got none")
    return frozenset(chosen)


def select_steps(steps: int | Iterable[int] | None) -> Container[int] | None:
    if steps is None:
        return None
    entries = [steps] if isinstance(steps, int) else list(steps)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int) or entry < 0:
            raise ValueError(f"steps: expected step indices of 0 or more, got {entry!r}")
    if not entries:
        raise ValueError("steps: expected at least one, got none")
    return frozenset(entries)


def select_fields(stats: bool | Sequence[str]) -> frozenset[str]:
    if isinstance(stats, bool):
        return frozenset(("mass", "gain") if stats else ())
    fields = [stats] if isinstance(stats, str) else list(stats)
    if unknown := [f for f in fields if f not in Stats._fields]:
        raise ValueError(
            f"stats: expected True, False or some of {', '.join(Stats._fields)}, got {unknown[0]!r}"
        )
    return frozenset(fields)


def check_backend(backend: str) -> str:
    usable = backends()
    if backend != "auto" and backend not in usable:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(usable)}, got {backend!r}")
    if reasons := usable.get(backend):
        raise ValueError(f"backend: {backend!r} is not usable here: {'; '.join(reasons)}")
    return backend

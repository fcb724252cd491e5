"""The planner: from a problem and its device to a backend, and the words for why not another."""

from __future__ import annotations

import warnings
from types import ModuleType

from ..core.problem import Problem
from . import reference
from .composed import attention as composed, backward as composed_backward
from .cpu import attention as cpu
from .cuda import attention as cuda
from .triton import attention as triton

BACKENDS: dict[str, ModuleType] = {m.name: m for m in (cpu, triton, cuda, composed, reference)}
FUSED = {"cpu": (cpu,), "cuda": (triton,), "hip": (triton,)}


def choose(problem: Problem) -> tuple[ModuleType, dict[str, list[str]]]:
    """The first backend that takes the problem, fused ones of its device first, and why the earlier ones do
    not.
    """
    refused: dict[str, list[str]] = {}
    for backend in (*FUSED.get(problem.q.device.type, ()), composed, reference):
        reasons = backend.available() or backend.why_not(problem)
        if not reasons:
            return backend, refused
        refused[backend.name] = reasons
    raise AssertionError("the reference backend takes every problem")


def resolve(problem: Problem, name: str) -> ModuleType:
    """The backend called `name`, or the planner's choice for "auto", which warns once when no fused one will
    do.

    Raises:
        ValueError: the named backend does not exist, or cannot solve the problem; the message says why.
    """
    if name == "auto":
        backend, refused = choose(problem)
        if refused:
            _warn_once(backend.name, tuple((k, tuple(v)) for k, v in refused.items()))
        return backend
    check_name(name)
    backend = BACKENDS[name]
    if reasons := (backend.available() or backend.why_not(problem)):
        raise ValueError(f"backend: {name!r} cannot run this call: {'; '.join(reasons)}")
    return backend


def resolve_backward(problem: Problem, name: str) -> ModuleType:
    """What computes the gradient of a call that ran on `name`: its own kernel where it has one, else torch
    operators.
    """
    empty = problem.batch * problem.rows * problem.heads * problem.keys == 0
    backend = FUSED.get(problem.q.device.type, (composed,))[0] if name == "auto" else BACKENDS[name]
    if empty or not hasattr(backend, "backward") or backend.available() or backend.why_not(problem):
        return composed_backward
    return backend


def check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {name!r}")


def backends() -> dict[str, list[str]]:
    """The backends by name, each with the reasons why it is not usable on this machine; an empty list: it is."""
    return {name: list(backend.available()) for name, backend in BACKENDS.items()}


_warned: set[tuple] = set()


def _warn_once(chosen: str, refused: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    if refused in _warned:
        return
    _warned.add(refused)
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused)
    warnings.warn(f"flashbrush: this call runs on the {chosen!r} backend ({why})", stacklevel=2)

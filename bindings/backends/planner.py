"""The planner: which backend runs a call of an operator, and in words why another does not.

Every operator goes through resolve(). It reads devices, dtypes, shapes and strides, never a value, so that a
changed number changes neither the choice nor the compilation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..core.problem import ONLY, Problem
from . import composed, cpu, cuda, reference, triton

BACKENDS: dict[str, ModuleType] = {b.name: b for b in (cpu, triton, cuda, composed, reference)}
OPERATORS = tuple(dict.fromkeys(operator for b in (composed, reference) for operator in b.OPERATORS))
# By device type: the backend with kernels for it that "auto" tries first. `cuda` runs only where it is named.
FUSED = {"cpu": cpu, "cuda": triton}
_GENERAL = (composed, reference)


def resolve(operator: str, backend: str, device: torch.device, *call: Any) -> Callable[..., Any]:
    """The function that runs this call of an operator.

    Args:
        operator: one of OPERATORS.
        backend: a name of BACKENDS, or "auto": the device's fused backend, else composed, else reference. A
            fallback from a fused backend warns once for each set of reasons; a gradient's does not, as the
            forward pass has warned.
        device: where the call's tensors are.
        call: what the operator's why_not takes.

    Raises:
        ValueError: the named backend does not exist or cannot run the call; the message says why.
    """
    if backend != "auto":
        check_name(backend)
        if refused := why_not(operator, backend, *call):
            raise ValueError(f"backend: {backend!r} cannot run this call: {'; '.join(refused)}")
        return BACKENDS[backend].OPERATORS[operator].run
    chosen, refused = choose(operator, device, *call)
    if refused and not operator.endswith("_backward"):
        _warn_once(operator, chosen.name, refused)
    return chosen.OPERATORS[operator].run


def choose(operator: str, device: torch.device, *call: Any) -> tuple[ModuleType, dict[str, list[str]]]:
    """The backend that "auto" takes, and the reasons of those before it that have the operator."""
    refused: dict[str, list[str]] = {}
    fused = FUSED.get(device.type)
    if fused is not None and operator in fused.OPERATORS:
        if not (reasons := why_not(operator, fused.name, *call)):
            return fused, refused
        refused[fused.name] = reasons
    for backend in _GENERAL:
        if operator in backend.OPERATORS:
            if not (reasons := why_not(operator, backend.name, *call)):
                return backend, refused
            refused[backend.name] = reasons
    raise AssertionError(f"{operator}: the last backend takes every call")


def why_not(operator: str, backend: str, *call: Any) -> list[str]:
    """The reasons why a backend cannot run this call; empty: it can."""
    module = BACKENDS[backend]
    if operator not in module.OPERATORS:
        return [f"it has no {operator}"]
    if reasons := module.available():
        return reasons
    if type(problem := call[0]) is Problem:
        for field, takers, noun in ONLY:
            if getattr(problem, field) is not None and backend not in takers:
                return [noun]
    return module.OPERATORS[operator].why_not(*call)


def resolve_backward(backend: str, problem: Problem) -> Callable[..., Any]:
    """The function for the gradient of an attention that ran on `backend`.

    A backend with a backward kernel uses it. A fused backend without one uses the device's; every other call
    uses the composed backward, which takes all calls. No warning here: a forward pass that fell back has
    warned already.
    """
    operator, device = "attention_backward", problem.q.device.type
    fused = FUSED.get(device)
    if backend == "auto" or (
        operator not in BACKENDS[backend].OPERATORS and BACKENDS[backend] not in _GENERAL
    ):
        backend = composed.name if fused is None else fused.name
    empty = problem.batch * problem.rows * problem.heads * problem.keys == 0
    if empty or why_not(operator, backend, problem):
        backend = composed.name
    return BACKENDS[backend].OPERATORS[operator].run


def check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {name!r}")


class Backends(dict[str, list[str]]):
    """{backend: the reasons why it is not usable on this machine}; an empty list: it is. Prints as a table.

    Attributes:
        operators: {operator: the names of the backends that implement it}
    """

    def __init__(self) -> None:
        super().__init__({name: list(backend.available()) for name, backend in BACKENDS.items()})
        self.operators = {
            operator: tuple(name for name, backend in BACKENDS.items() if operator in backend.OPERATORS)
            for operator in OPERATORS
        }

    def __repr__(self) -> str:
        width = max(map(len, self.operators))
        lines = [" ".join([" " * width, *(f"{name:>9}" for name in self)])]
        for operator, names in self.operators.items():
            cells = ("-" if name not in names else "no" if self[name] else "yes" for name in self)
            lines.append(" ".join([f"{operator:{width}}", *(f"{cell:>9}" for cell in cells)]))
        lines += [f"{name}: {'; '.join(reasons)}" for name, reasons in self.items() if reasons]
        return "\n".join(lines)


def backends() -> Backends:
    """The backends: which operators each has, and which are usable on this machine.

    Returns:
        A dict {backend: reasons why it is not usable here}; an empty list means usable. Printed, it is a
        table of operators and backends: yes, no (not usable here), or - (the backend lacks the operator).

    Examples:
        >>> import flashbrush as fb
        >>> fb.backends()["composed"]
        []
        >>> "cpu" in fb.backends().operators["attention"]
        True
    """
    return Backends()


_warned: set[tuple] = set()


def _warn_once(operator: str, chosen: str, refused: dict[str, list[str]]) -> None:
    key = (operator, *((name, tuple(reasons)) for name, reasons in refused.items()))
    if key in _warned:
        return
    _warned.add(key)
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items())
    call = "this call" if operator == "attention" else f"this call of {operator}"
    warnings.warn(f"flashbrush: {call} runs on the {chosen!r} backend ({why})", stacklevel=2)

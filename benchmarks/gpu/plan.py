"""The tasks of `benchmarks/gpu/run.py`, the most important first; each gives one row of the results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...bindings import backends
from ..timing.rows import Row
from . import backward, ceilings, checks, cuda_builds, flux_layer, forward, operators
from .setup import NO_CUDA, Setup
from .shapes import GPU_SHAPES, LAYERS, LONG, MAIN, SMALL

GROUPS = tuple(checks.FORWARD_GROUPS.items())
SECTIONS = (
    "ceilings",
    "checks",
    "forward",
    "layer",
    "variants",
    "backward",
    "features",
    "around",
    "compiled",
)


@dataclass(frozen=True)
class Task:
    """What makes one row.

    Attributes:
        section: of the row.
        title: of the row.
        run: makes the row.
        seconds: its estimated duration on a GPU; it is not started with less time left.
        apart: it times nothing, so that others may run beside it.
        cuda: the cuda backend takes part beside other contestants.
    """

    section: str
    title: str
    run: Callable[[Setup], Row]
    seconds: float
    apart: bool = False
    cuda: bool = False

    @property
    def limit(self) -> float:
        """Seconds after which it is stopped."""
        return max(90.0, 2 * self.seconds)


def tasks(sections: Sequence[str] = SECTIONS) -> list[Task]:
    """The plan: checks first, then FLUX's shapes, then the rest.

    Args:
        sections: those of SECTIONS to keep.

    Raises:
        ValueError: an unknown section.
    """
    if unknown := [s for s in sections if s not in SECTIONS]:
        raise ValueError(f"sections: unknown {', '.join(unknown)}; expected some of {', '.join(SECTIONS)}")
    return [task for task in _all() if task.section in sections]


def _all() -> list[Task]:
    plan = [Task("ceilings", "copy and matrix product", ceilings.measure, 3)]
    plan += [_check(name, functools.partial(checks.features, names=names), 30) for name, names in GROUPS]
    plan += [
        _check("head dims and dtypes", checks.dims_and_dtypes, 40),
        *(_on_cuda(name, functools.partial(checks.features, names=names)) for name, names in GROUPS),
        _on_cuda("head dims and dtypes", checks.dims_and_dtypes),
        _on_cuda("a thousand repeats", checks.repeats),
        _check("a thousand repeats", checks.repeats, 15),
        _check("gradients", checks.gradients, 60),
        _check("around attention", operators.checks, 20),
        Task("variants", "compiled", cuda_builds.compile_all, 60, apart=True),
        _forward(MAIN),
        _layer(MAIN),
        *(_forward(name) for name in GPU_SHAPES if name not in (MAIN, *LONG)),
        *(_build(shape, name) for shape in (MAIN, "sd3-1024") for name in cuda_builds.names(shape)),
        _backward(MAIN),
        _features(MAIN),
        *(_layer(name) for name in LAYERS if name != MAIN),
        *(_forward(name) for name in LONG),
    ]
    plan += [
        Task("around", operator.name, functools.partial(operators.measure, operator=operator), 4)
        for operator in operators.OPERATORS
    ]
    plan += [_features("sd15-64"), _backward("sd3-1024"), _backward("tokens-16k")]
    return [*plan, _entries("compiled", MAIN, forward.compiled_entries, 45)]


def _check(title: str, run: Callable[[Setup], Row], seconds: float, cuda: bool = False) -> Task:
    return Task("checks", title, run, seconds, apart=True, cuda=cuda)


def _on_cuda(title: str, run: Callable[[Setup], Row]) -> Task:
    """The check on the cuda backend; what it refuses is missing, and everything where it is not usable."""

    def on_cuda(setup: Setup) -> Row:
        reasons = backends()["cuda"] if setup.cuda else [NO_CUDA]
        if reasons:
            return {"missing": {"cuda": "; ".join(reasons)}}
        return run(replace(setup, backend="cuda"))

    return _check(f"{title}, cuda", on_cuda, 15, cuda=True)


def _entries(
    section: str,
    shape: str,
    entries: Callable[[Setup], list[forward.Entry]],
    seconds: float,
    graphs: bool = False,
) -> Task:
    def run(setup: Setup) -> Row:
        return {**forward.measure(setup, GPU_SHAPES[shape], entries(setup), graphs), "section": section}

    return Task(section, shape, run, seconds, cuda=section != "compiled")


def _forward(shape: str) -> Task:
    return _entries("forward", shape, forward.main_entries, 20 if shape in LONG else 10, shape in SMALL)


def _features(shape: str) -> Task:
    return _entries("features", shape, forward.feature_entries, 12)


def _layer(shape: str) -> Task:
    return Task("layer", shape, functools.partial(flux_layer.measure, shape=GPU_SHAPES[shape]), 8)


def _build(shape: str, name: str) -> Task:
    """Not `cuda`: a crash of another build says nothing about the installed kernel."""
    return Task(
        "variants", f"{shape}, {name}", functools.partial(cuda_builds.measure, shape=shape, name=name), 6
    )


def _backward(shape: str) -> Task:
    return Task("backward", shape, functools.partial(backward.measure, shape=GPU_SHAPES[shape]), 15)

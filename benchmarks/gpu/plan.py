"""What `benchmarks/gpu/run.py` does, in the order of its importance: each task gives one row of the results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...bindings import backends
from ..cpu.forward import Row
from . import (
    around as gpu_around,
    backward as gpu_backward,
    checks as gpu_checks,
    forward as gpu_forward,
    layer as gpu_layer,
    machine as gpu_machine,
    variants as gpu_variants,
)
from .machine import Setup
from .shapes import GPU_SHAPES, LAYERS, LONG, MAIN, SMALL

GROUPS = tuple(gpu_checks.FORWARD_GROUPS.items())
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
    """One row.

    seconds: about what it takes on a GPU; it is not begun with less left, and ended after `limit`. apart: it
        times
    nothing, so that others may run beside it. cuda: the cuda backend takes part, beside others.
    """

    section: str
    title: str
    run: Callable[[Setup], Row]
    seconds: float
    apart: bool = False
    cuda: bool = False

    @property
    def limit(self) -> float:
        return max(90.0, 2 * self.seconds)


def tasks(sections: Sequence[str] = SECTIONS) -> list[Task]:
    """The plan: checks first, then the shapes that FLUX has, then the rest.

    Raises:
        ValueError: an unknown section.
    """
    if unknown := [s for s in sections if s not in SECTIONS]:
        raise ValueError(f"sections: unknown {', '.join(unknown)}; expected some of {', '.join(SECTIONS)}")
    return [task for task in _all() if task.section in sections]


def _all() -> list[Task]:
    plan = [Task("ceilings", "copy and matrix product", gpu_machine.ceilings, 3)]
    plan += [
        _check(name, functools.partial(gpu_checks.features, labels=labels), 30) for name, labels in GROUPS
    ]
    plan += [
        _check("head dims and dtypes", gpu_checks.dims_and_dtypes, 40),
        *(_on_cuda(name, functools.partial(gpu_checks.features, labels=labels)) for name, labels in GROUPS),
        _on_cuda("head dims and dtypes", gpu_checks.dims_and_dtypes),
        _on_cuda("a thousand repeats", gpu_checks.repeats),
        _check("a thousand repeats", gpu_checks.repeats, 15),
        _check("gradients", gpu_checks.gradients, 60),
        _check("around attention", gpu_around.checks, 20),
        Task("variants", "compiled", gpu_variants.compile_all, 60, apart=True),
        _forward(MAIN),
        _layer(MAIN),
        *(_forward(name) for name in GPU_SHAPES if name not in (MAIN, *LONG)),
        *(_variant(shape, name) for shape in (MAIN, "sd3-1024") for name in gpu_variants.names(shape)),
        _backward(MAIN),
        _features(MAIN),
        *(_layer(name) for name in LAYERS if name != MAIN),
        *(_forward(name) for name in LONG),
    ]
    plan += [
        Task("around", operator.name, functools.partial(gpu_around.measure, operator=operator), 4)
        for operator in gpu_around.OPERATORS
    ]
    plan += [_features("sd15-64"), _backward("sd3-1024"), _backward("tokens-16k")]
    return [*plan, _entries("compiled", MAIN, gpu_forward.compiled_entries, 45)]


def _check(title: str, run: Callable[[Setup], Row], seconds: float, cuda: bool = False) -> Task:
    return Task("checks", title, run, seconds, apart=True, cuda=cuda)


def _on_cuda(title: str, run: Callable[[Setup], Row]) -> Task:
    """What the cuda backend does not take is listed as missing, or all of it where it is not usable."""

    def on_cuda(setup: Setup) -> Row:
        reasons = backends()["cuda"] if setup.cuda else [gpu_machine.NO_CUDA]
        if reasons:
            return {"missing": {"cuda": "; ".join(reasons)}}
        return run(replace(setup, backend="cuda"))

    return _check(f"{title}, cuda", on_cuda, 15, cuda=True)


def _entries(
    section: str,
    shape: str,
    entries: Callable[[Setup], list[gpu_forward.Entry]],
    seconds: float,
    graphs: bool = False,
) -> Task:
    def run(setup: Setup) -> Row:
        return {**gpu_forward.measure(setup, GPU_SHAPES[shape], entries(setup), graphs), "section": section}

    return Task(section, shape, run, seconds, cuda=section != "compiled")


def _forward(shape: str) -> Task:
    return _entries("forward", shape, gpu_forward.main_entries, 20 if shape in LONG else 10, shape in SMALL)


def _features(shape: str) -> Task:
    return _entries("features", shape, gpu_forward.feature_entries, 12)


def _layer(shape: str) -> Task:
    return Task("layer", shape, functools.partial(gpu_layer.measure, shape=GPU_SHAPES[shape]), 8)


def _variant(shape: str, name: str) -> Task:
    """Not `cuda`: the kernel as it is built has no part in what another does to its process."""
    return Task(
        "variants", f"{shape}, {name}", functools.partial(gpu_variants.measure, shape=shape, name=name), 6
    )


def _backward(shape: str) -> Task:
    return Task("backward", shape, functools.partial(gpu_backward.measure, shape=GPU_SHAPES[shape]), 15)

"""What `benchmarks/gpu.py` does, in the order of its importance: each task gives one row of the results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..bindings import backends
from . import gpu_around, gpu_backward, gpu_checks, gpu_forward, gpu_layer, gpu_machine, gpu_variants
from .forward import Row
from .gpu_machine import Setup
from .gpu_shapes import GPU_SHAPES, LAYERS, LONG, MAIN, SMALL

SECTIONS = ("ceilings", "checks", "forward", "layer", "variants", "backward", "features", "around", "compiled")


@dataclass(frozen=True)
class Task:
    """seconds: about what it takes on a GPU; it is not begun with less left, and ended after `limit` times as much."""

    section: str
    title: str
    run: Callable[[Setup], Row]
    seconds: float

    @property
    def limit(self) -> float:
        return max(90.0, 6 * self.seconds)

    @property
    def apart(self) -> bool:
        """Whether it times nothing, so that others may run beside it."""
        return self.section == "checks"


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
        Task("checks", name, functools.partial(gpu_checks.features, labels=labels), 30)
        for name, labels in gpu_checks.FORWARD_GROUPS.items()
    ]
    plan += [
        Task("checks", "head dims and dtypes", gpu_checks.dims_and_dtypes, 40),
        *(
            Task("checks", f"{name}, cuda", _on_cuda(functools.partial(gpu_checks.features, labels=labels)), 15)
            for name, labels in gpu_checks.FORWARD_GROUPS.items()
        ),
        Task("checks", "head dims and dtypes, cuda", _on_cuda(gpu_checks.dims_and_dtypes), 15),
        Task("checks", "a thousand repeats, cuda", _on_cuda(gpu_checks.repeats), 15),
        Task("checks", "a thousand repeats", gpu_checks.repeats, 15),
        Task("checks", "gradients", gpu_checks.gradients, 60),
        Task("checks", "around attention", gpu_around.checks, 20),
        _forward(MAIN),
        _layer(MAIN),
        *(_forward(name) for name in GPU_SHAPES if name not in (MAIN, *LONG)),
        *(_variants(name) for name in (MAIN, "sd3-1024")),
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


def _on_cuda(run: Callable[[Setup], Row]) -> Callable[[Setup], Row]:
    """What the cuda backend does not take is listed as missing, or all of it where it is not usable."""

    def on_cuda(setup: Setup) -> Row:
        if reasons := backends()["cuda"]:
            return {"missing": {"cuda": "; ".join(reasons)}}
        return run(replace(setup, backend="cuda"))

    return on_cuda


def _entries(
    section: str, shape: str, entries: Callable[[Setup], list[gpu_forward.Entry]], seconds: float, graphs: bool = False
) -> Task:
    def run(setup: Setup) -> Row:
        return {**gpu_forward.measure(setup, GPU_SHAPES[shape], entries(setup), graphs), "section": section}

    return Task(section, shape, run, seconds)


def _forward(shape: str) -> Task:
    return _entries("forward", shape, gpu_forward.main_entries, 20 if shape in LONG else 10, shape in SMALL)


def _features(shape: str) -> Task:
    return _entries("features", shape, gpu_forward.feature_entries, 12)


def _layer(shape: str) -> Task:
    return Task("layer", shape, functools.partial(gpu_layer.measure, shape=GPU_SHAPES[shape]), 8)


def _variants(shape: str) -> Task:
    return Task("variants", shape, functools.partial(gpu_variants.measure_variants, shape=shape), 45)


def _backward(shape: str) -> Task:
    return Task("backward", shape, functools.partial(gpu_backward.measure, shape=GPU_SHAPES[shape]), 15)

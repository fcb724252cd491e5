"""The CUDA kernel with other tile sizes: compiled during the run, checked, timed beside the built kernel."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ...bindings.backends.cuda import attention as cuda
from ..cases.contestants import Call, Contestant, Missing
from ..cases.inputs import Case
from ..timing.rows import Row
from . import contestants, forward
from .setup import NO_CUDA, Setup
from .shapes import GPU_SHAPES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "variants"
NOT_BUILT = "not built: --build was not given"
# By head dim and build: macros that replace the numbers of csrc/cuda/attention.cu.
BUILDS: dict[int, dict[str, dict[str, int]]] = {
    128: {
        "three groups, 80 keys": {"GROUPS_128": 3, "KEYS_128": 80},
        "three groups, 64 keys": {"GROUPS_128": 3, "KEYS_128": 64},
        "160 keys": {"KEYS_128": 160},
        "176 keys": {"KEYS_128": 176},
        "4 of 16 by polynomial": {"POLYNOMIAL_128": 4},
        "no overlap": {"OVERLAP": 0},
    },
    64: {
        "two groups": {"GROUPS_64": 2},
        "two groups, 176 keys": {"GROUPS_64": 2, "KEYS_64": 176},
        "4 of 16 by polynomial": {"POLYNOMIAL_64": 4},
        "6 of 16 by polynomial": {"POLYNOMIAL_64": 6},
        "two groups, 4 of 16": {"GROUPS_64": 2, "POLYNOMIAL_64": 4},
        "no overlap": {"OVERLAP": 0},
    },
}


def names(shape: str) -> list[str]:
    """The builds for a shape's head dim."""
    return list(BUILDS[GPU_SHAPES[shape].dim])


def compile_all(setup: Setup) -> Row:
    """A row of what was compiled, all builds in parallel; one that does not compile is missing."""
    if not setup.build:
        return {"missing": {"variants": NOT_BUILT}}
    try:
        builder = load_builder()
    except Missing as reason:
        return {"missing": {"variants": str(reason)}}
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            (dim, name): pool.submit(_compile, builder, dim, numbers, _library(dim, name))
            for dim, builds in BUILDS.items()
            for name, numbers in builds.items()
        }
    found = {f"{dim}, {name}": job.result() for (dim, name), job in jobs.items()}
    row: Row = {"missing": {name: report["error"] for name, report in found.items() if report["error"]}}
    return {**row, "built": {name: report for name, report in found.items() if not report["error"]}}


def measure(setup: Setup, shape: str, name: str) -> Row:
    """One build, plain and with In-Context Brush, beside the installed kernel and cuDNN."""
    library = _library(GPU_SHAPES[shape].dim, name)
    if not setup.build or not setup.cuda or not library.exists():
        return {
            "missing": {
                name: NOT_BUILT if not setup.build else NO_CUDA if not setup.cuda else "it was not compiled"
            }
        }
    entries: list[forward.Entry] = [("cudnn", contestants.VENDORS["cudnn"], "plain")]
    for form in ("plain", "brush"):
        ours = contestants.ours_named(setup, f"cuda_{form}")
        entries += [
            (f"cuda_{form}", ours, form),
            (f"{form}, {name}", _of_build(ours, library, form, name), form),
        ]
    return forward.measure(setup, GPU_SHAPES[shape], entries)


def load_builder() -> dict[str, Any]:
    """The names that setup.py defines.

    Raises:
        Missing: setup.py cannot be imported, for lack of a newer setuptools.
    """
    try:
        return runpy.run_path(str(ROOT / "setup.py"))
    except ImportError as error:
        raise Missing(f"setup.py does not load, a newer setuptools may be needed: {error}") from error


def _library(dim: int, name: str) -> Path:
    return FOLDER / f"{dim}-{list(BUILDS[dim]).index(name)}.so"


def _compile(
    builder: Mapping[str, Any], dim: int, numbers: Mapping[str, int], library: Path
) -> dict[str, Any]:
    """The compiler's report on one build, in the form of setup.py's; `error` is None on success."""
    report: dict[str, Any] = {"error": None, "kernels": {}, "warnings": []}
    sources = [str(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    defined = [f"-DFLASHBRUSH_{name}={value}" for name, value in {"TRIAL_DIM": dim, **numbers}.items()]
    try:
        compiler = builder["find_cuda_compiler"]()
        output = builder["call"]([compiler, *builder["CUDA_FLAGS"], *defined, *sources, "-o", str(library)])
        builder["read_resources"](output, report)
    except (builder["BuildError"], OSError) as error:
        report["error"] = " ".join(str(error).split())
    return report


def _of_build(ours: Contestant, library: Path, form: str, name: str) -> Contestant:
    """Our call with the library of a build in place of the installed one."""

    def prepare(case: Case) -> tuple[Call, bool]:
        with cuda.trial(library):
            call, heads_first = ours.prepare(case)

        def run() -> Tensor:
            with cuda.trial(library):
                return call()

        return run, heads_first

    return Contestant(f"{form}, {name}", f"flashbrush cuda, {form}, {name}", ours.controlled, prepare)

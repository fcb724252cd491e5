"""Other tiles of the CUDA kernel than the ones it is built with, compiled on the spot, checked and timed beside them."""

from __future__ import annotations

import os
import runpy
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bindings.backends import cuda
from . import gpu_peers
from .forward import Row
from .gpu_forward import Entry, measure
from .gpu_machine import Setup
from .gpu_shapes import GPU_SHAPES
from .peers import Call, Case, Missing, Peer

ROOT = Path(__file__).resolve().parents[1]
# By head dim: what csrc/cuda/attention.cu takes in place of its own numbers.
VARIANTS: dict[int, dict[str, dict[str, int]]] = {
    128: {
        "as built": {},
        "three groups, 80 keys": {"GROUPS_128": 3, "KEYS_128": 80},
        "three groups, 64 keys": {"GROUPS_128": 3, "KEYS_128": 64},
        "160 keys": {"KEYS_128": 160},
        "176 keys": {"KEYS_128": 176},
        "4 of 16 by polynomial": {"POLYNOMIAL_128": 4},
    },
    64: {
        "as built": {},
        "two groups": {"GROUPS_64": 2},
        "two groups, 176 keys": {"GROUPS_64": 2, "KEYS_64": 176},
        "4 of 16 by polynomial": {"POLYNOMIAL_64": 4},
        "6 of 16 by polynomial": {"POLYNOMIAL_64": 6},
        "two groups, 4 of 16": {"GROUPS_64": 2, "POLYNOMIAL_64": 4},
    },
}


def measure_variants(setup: Setup, shape: str) -> Row:
    """Plain and with In-Context Brush, at one shape, beside cuDNN. A variant that does not compile is missing."""
    if not setup.build:
        return {"missing": {"variants": "not built: --build was not given"}}
    variants = VARIANTS[GPU_SHAPES[shape].dim]
    with tempfile.TemporaryDirectory() as folder:
        try:
            built = build(variants, Path(folder))
        except Missing as reason:
            return {"missing": {"variants": str(reason)}}
        missing = {name: path for name, path in built.items() if isinstance(path, str)}
        entries: list[Entry] = [("cudnn", gpu_peers.VENDORS["cudnn"], "plain")]
        for name, path in built.items():
            if isinstance(path, Path):
                entries += [(f"{form}, {name}", _peer(setup, path, form, name), form) for form in ("plain", "brush")]
        row = measure(setup, GPU_SHAPES[shape], entries)
    found = row["missing"]
    assert isinstance(found, dict)
    return {**row, "missing": {**found, **missing}}


def load_builder() -> dict[str, Any]:
    """What setup.py defines.

    Raises:
        Missing: it needs a newer setuptools.
    """
    try:
        return runpy.run_path(str(ROOT / "setup.py"))
    except ImportError as error:
        raise Missing(f"setup.py does not load, a newer setuptools may be needed: {error}") from error


def build(variants: Mapping[str, Mapping[str, int]], folder: Path) -> dict[str, Path | str]:
    """The library of each variant, or why there is none."""
    builder = load_builder()

    def compile_one(index: int, numbers: Mapping[str, int]) -> Path | str:
        library = folder / f"variant{index}.so"
        sources = [str(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
        defined = [f"-DFLASHBRUSH_{name}={value}" for name, value in numbers.items()]
        try:
            builder["call"]([builder["find_cuda_compiler"](), *builder["CUDA_FLAGS"], *defined, *sources, "-o", str(library)])
        except (builder["BuildError"], OSError) as error:
            return " ".join(str(error).split())
        return library

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {name: pool.submit(compile_one, i, numbers) for i, (name, numbers) in enumerate(variants.items())}
        return {name: job.result() for name, job in jobs.items()}


def _peer(setup: Setup, library: Path, form: str, name: str) -> Peer:
    ours = gpu_peers.mine(setup, f"cuda_{form}")

    def prepare(case: Case) -> tuple[Call, bool]:
        with cuda.trial(library):
            call, heads_first = ours.prepare(case)

        def run() -> Tensor:
            with cuda.trial(library):
                return call()

        return run, heads_first

    return Peer(f"{form}, {name}", f"flashbrush cuda, {form}, {name}", ours.controlled, prepare)

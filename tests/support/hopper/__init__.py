"""CUDA kernels on the CPU: csrc/cuda compiled with hopper_emulated.h in place of the hardware."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from ..builder import load_setup

HEADERS = Path(__file__).parent
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-psabi", f"-I{HEADERS}", "-DFLASHBRUSH_EMULATED"]


def build(source: Path, library: Path, *flags: str) -> Path:
    """Compiles one source into a shared library; skips where fibers are not tried."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip(f"fibers are not tried on {platform.system()} {platform.machine()}")
    setup = load_setup()
    try:
        compiler = setup.find_compiler()
    except setup.BuildError as error:
        pytest.skip(str(error))
    command = [*compiler, *FLAGS, *flags, "-x", "c++", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library

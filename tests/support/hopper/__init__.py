"""CUDA kernels on the CPU: csrc/cuda compiled with hopper_emulated.h in place of the hardware."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HEADERS = Path(__file__).parent
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-psabi", f"-I{HEADERS}", "-DFLASHBRUSH_EMULATED"]


def find_compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in (named, ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    pytest.skip("no C++ compiler: neither CXX names one nor is c++, g++ or clang++ found")


def build(source: Path, library: Path, *flags: str) -> Path:
    """Compiles one source into a shared library; skips where fibers are not tried."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip(f"fibers are not tried on {platform.system()} {platform.machine()}")
    command = [*find_compiler(), *FLAGS, *flags, "-x", "c++", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library

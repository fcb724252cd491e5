"""The conditions of a measurement: machine, versions, threads, load and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
    "i8mm",
)


def describe() -> dict[str, object]:
    """What a reader needs to judge or repeat a measurement; no name of a user or a host."""
    fields = _cpuinfo()
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": fields.get("cpu family"),
        "cpu_model": fields.get("model"),
        "architecture": platform.machine(),
        "isa": [flag for flag in FLAGS if flag in present],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "forced_isa": os.environ.get("FLASHBRUSH_CPU_ISA"),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flashbrush": _version("flashbrush"),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def load() -> float | None:
    """The last minute's load average; other processes ran if it is well above the number of threads."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def commit() -> str | None:
    """The checkout's commit, with "+" where tracked files other than results differ; None without one."""
    if not (ROOT / ".git").exists():
        return None
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":(exclude)benchmarks/results",
        ":(exclude)README.md",
    )
    return None if head is None else head + ("+" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpuinfo() -> dict[str, str]:
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as lines:
            for name, _, value in (line.partition(":") for line in lines):
                fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    return fields


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "flashbrush":
            from ... import __version__

            return __version__
        return None

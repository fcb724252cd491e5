"""Facts about Triton and about a tensor's device."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

OLDEST_TRITON = (3, 6)  # the first that takes tuples of pointers as kernel arguments


def triton_reasons() -> list[str]:
    """Reasons why Triton kernels cannot run on this machine; empty if they can."""
    if reason := _triton_version_reason():
        return [reason]
    # is_initialized() is cheaper than is_available(), and True implies it.
    if not (torch.cuda.is_initialized() or torch.cuda.is_available() or interpreted()):
        return ["no GPU is visible to torch"]
    return []


@functools.cache
def _triton_version_reason() -> str:
    """Why the installed Triton cannot be used; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    return ""


def interpreted() -> bool:
    """True if Triton interprets kernels on the CPU: TRITON_INTERPRET=1 when it was imported."""
    return (runtime := _triton_runtime()) is not None and bool(runtime.interpret)


@functools.cache
def _triton_runtime() -> Any:
    """Triton's run-time switches; None if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from triton import knobs

    return knobs.runtime


@functools.cache
def arch(device: torch.device) -> int:
    """Compute capability times 10; 0 for a device that is not NVIDIA's."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for another device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Make t's GPU the current one: kernels are launched on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()

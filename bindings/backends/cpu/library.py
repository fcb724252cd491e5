"""The shared library built from csrc/cpu: loading it, and running one of its functions.

The library knows nothing of torch. It is called through its C interface and runs on torch's own threads.
FLASHBRUSH_CPU_ISA=amx|avx512bf16|avx512|avx2|portable forces one of the instruction sets that are built in.
Without it the best of them runs, except AMX, which passes its tests on hardware but has not been timed.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import Structure, byref, c_char_p, c_int, c_void_p
from pathlib import Path

import torch

from ..shared_library import open_library

ABI = 2
LIBRARY = Path(__file__).parents[1] / "libflashbrush_cpu.so"
BY_NAME_ONLY = ("amx",)  # instruction sets that run only where FLASHBRUSH_CPU_ISA names them
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the library numbers them
FUNCTIONS = ("attention", "backward", "column_mass", "norm_rope", "norm_rope_backward")
_FAILURES = {
    1: "the instruction set is not available",
    2: "out of memory",
    3: "the shared library is of another version; build it again",
}


def available() -> list[str]:
    library, reason = _load()
    if library is None:
        return [reason]
    wanted = _wanted_isa()
    if wanted and wanted not in isas():
        return [
            f"FLASHBRUSH_CPU_ISA={wanted} is not one of {', '.join(isas())}, which are built in and run here"
        ]
    return []


def isas() -> list[str]:
    """The instruction sets that are built in and run here, best first, with those of BY_NAME_ONLY."""
    library, _ = _load()
    names = []
    while library is not None and (isa := library.flashbrush_isa(len(names))):
        names.append(isa.decode())
    return names


def run(function: str, call: Structure) -> None:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    code = getattr(library, f"flashbrush_{function}")(byref(call), _wanted_isa().encode(), _parallel())
    if code:
        raise RuntimeError(f"flashbrush: {function} on the cpu backend failed: {_FAILURES.get(code, code)}")


def _wanted_isa() -> str:
    return os.environ.get("FLASHBRUSH_CPU_ISA", "")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(library, reason why there is none)"""
    library, reason = open_library(LIBRARY)
    if library is None:
        return None, reason
    if library.flashbrush_abi() != ABI:
        return None, _FAILURES[3]
    library.flashbrush_isa.restype = c_char_p
    library.flashbrush_isa.argtypes = (c_int,)
    for function in FUNCTIONS:
        getattr(library, f"flashbrush_{function}").argtypes = (c_void_p, c_char_p, c_void_p)
    return library, ""


@functools.cache
def _parallel() -> int | None:
    """The address of GOMP_parallel in torch's OpenMP runtime, whose threads run already and are used again.

    None if torch is built with another runtime; the library then starts its own threads.
    """
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(torch_cpu)).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None

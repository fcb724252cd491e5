"""Compiles what a Triton call would launch, for a GPU that is not there: registers, spills, shared memory, wgmma.

    python -m support.compile_kernels ARCH < cases.json > report.json

Kernels must be compiled in a process that did not choose Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import flashbrush as fb
from flashbrush.bindings.attention import _lower
from flashbrush.bindings.backends import triton as backend
from flashbrush.bindings.backends import triton_launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CONTROLS = {
    "plain": {},
    "weighted": {"weight": {("b", "a"): 1.3}},
    "brush": {"weight": {("b", "a"): 1.3}, "head_gain": fb.HeadGain(rows="b", keys="a")},
    "groups": {"groups": {"x": ["a"], "y": ["b"]}, "gates": {"x": 0.8}},
    "contrast": {"contrast": fb.Contrast(1.67, None)},
    "clip": {"contrast": fb.Contrast(1.67, (0.0, 1.0))},
}


class Device:
    """What Triton asks of the active GPU's driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(control: str, dim: int, dtype: str) -> list[dict]:
    """The kernels of one call, each with its resources."""
    q, k, v = (torch.zeros(1, 512, 4, dim, dtype=getattr(torch, dtype)) for _ in range(3))
    segments = fb.Segments(a=256, b=256)
    problem = _lower(q, k, v, fb.Control(segments, **CONTROLS[control]), None, None, None, None)
    compiled = []
    run = JITFunction.run

    def warm_up(self, *args, **options):
        options["warmup"] = True
        compiled.append((self.__name__, run(self, *args, **options)))
        return compiled[-1][1]

    JITFunction.run = warm_up
    try:
        backend._forward(problem)
    finally:
        JITFunction.run = run
    return [{"kernel": name, **resources(kernel)} for name, kernel in compiled]


def resources(kernel) -> dict:
    ptx, metadata = kernel.asm["ptx"], kernel.metadata
    target = re.search(r"\.target (\S+?)[,\s]", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        newest = TOOLS / "ptxas-blackwell"
        ptxas = newest if newest.exists() else TOOLS / "ptxas"
        command = [str(ptxas), "-v", f"--gpu-name={target[1]}", str(source), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if done.returncode or found is None or registers is None:
        raise RuntimeError(f"ptxas: {log}")
    return {
        "registers": int(registers[1]), "spills": int(found[1]) + int(found[2]), "shared": metadata.shared,
        "warps": metadata.num_warps, "wgmma": "wgmma.mma_async" in ptx, "mma": "mma.sync" in ptx,
    }  # fmt: skip


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    triton.runtime.driver.set_active(Device(wanted))
    triton_launch.arch = lambda device: 10 * (wanted // 10) + wanted % 10
    json.dump([{"case": case, "kernels": compile_case(*case)} for case in json.load(sys.stdin)], sys.stdout)

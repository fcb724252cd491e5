"""Compiles what a call would launch, for a GPU that is not there: registers, spills, shared memory, tensor
cores.

    python -m support.compile_kernels TARGET < cases.json > report.json

TARGET: sm_90, gfx942 ... A case is [operator, variant, head dim, dtype]. Kernels must be compiled in a
    process that did
not choose Triton's interpreter.
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
from flashbrush.bindings.backends.triton import (
    attention as backend,
    backward as triton_backward,
    column_mass as triton_column_mass,
    qk_norm_rope as triton_norm_rope,
    query_blur as triton_query_blur,
)
from flashbrush.bindings.core.lowering import lower
from flashbrush.bindings.core.norm_rope import NormRope
from flashbrush.bindings.core.problem import Problem

from .small_operator_calls import SMALL_OPERATOR_CALLS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CONTROLS = {
    "plain": {},
    "weighted": {"weight": {("b", "a"): 1.3}},
    "brush": {"weight": {("b", "a"): 1.3}, "head_gain": fb.HeadGain(rows="b", keys="a")},
    "groups": {"groups": {"x": ["a"], "y": ["b"]}, "gates": {"x": 0.8}},
    "words": {"weight": {("*", f"w{i}"): 1 + i / 77 for i in range(77)}},
    "contrast": {"contrast": fb.Contrast(1.67, None)},
    "clip": {"contrast": fb.Contrast(1.67, (0.0, 1.0))},
}


class Device:
    """What Triton asks of the active GPU's driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def parse(target: str) -> GPUTarget:
    return (
        GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    )


def problem_of(control: str, dim: int, dtype: torch.dtype) -> Problem:
    rows = fb.Segments(a=256, b=256)
    keys = fb.Segments({f"w{i}": 1 for i in range(77)}) if control == "words" else rows
    q = torch.zeros(1, rows.total, 4, dim, dtype=dtype)
    k, v = (torch.zeros(1, keys.total, 4, dim, dtype=dtype) for _ in range(2))
    return lower(q, k, v, fb.Control(rows, keys, **CONTROLS[control]))


def backward(p: Problem) -> None:
    lse = torch.zeros(p.batch, p.heads, p.rows, p.n_groups)
    gain = torch.ones(p.batch, p.heads, len(p.row_lengths))
    triton_backward.backward(p, torch.zeros_like(p.q), torch.zeros_like(p.q), lse, gain)


def column_mass(p: Problem) -> None:
    lse = torch.zeros(p.batch, p.heads, p.rows, p.n_groups)
    triton_column_mass.column_mass(p, lse, tuple(range(len(p.row_lengths))))


def norm_rope(variant: str, dim: int, dtype: torch.dtype) -> None:
    xs = [torch.zeros(1, tokens, 24, dim, dtype=dtype) for tokens in (512, 1024)]
    weights: list[torch.Tensor | None] = [torch.ones(dim, dtype=dtype) for _ in xs]
    tables = torch.zeros(1536, dim), torch.zeros(1536, dim), 1e-6, "half" in variant, None
    call = NormRope(xs, weights, [None] * 2, *tables)
    if "backward" in variant:
        triton_norm_rope.backward(torch.zeros(1, 1536, 24, dim, dtype=dtype), call)
    else:
        triton_norm_rope.forward(call)


ATTENTION = {"forward": lambda p: backend._forward(p), "backward": backward, "column_mass": column_mass}


def call(operator: str, variant: str, dim: int, dtype: torch.dtype) -> None:
    if operator in ATTENTION:
        ATTENTION[operator](problem_of(variant, dim, dtype))
    elif operator == "norm_rope":
        norm_rope(variant, dim, dtype)
    else:
        SMALL_OPERATOR_CALLS[variant](dtype)


def compile_case(operator: str, variant: str, dim: int, dtype: str) -> list[dict]:
    """The kernels of one call, each with its resources."""
    compiled = []
    run = JITFunction.run

    def warm_up(self, *args, **options):
        options["warmup"] = True
        compiled.append((self.__name__, run(self, *args, **options)))
        return compiled[-1][1]

    JITFunction.run = warm_up
    try:
        call(operator, variant, dim, getattr(torch, dtype))
    finally:
        JITFunction.run = run
    return [{"kernel": name, **resources(kernel)} for name, kernel in compiled]


def resources(kernel) -> dict:
    metadata = kernel.metadata
    common = {"shared": metadata.shared, "warps": metadata.num_warps}
    if "amdgcn" in kernel.asm:
        assembly = kernel.asm["amdgcn"]
        counts = {
            name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count")
        }
        tensor_cores = "v_mfma" if "v_mfma" in assembly else ""
        return {
            **common,
            "registers": counts["vgpr_count"],
            "spills": counts["vgpr_spill_count"],
            "tensor_cores": tensor_cores,
        }
    ptx = kernel.asm["ptx"]
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
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if done.returncode or spilled is None or registers is None:
        raise RuntimeError(f"ptxas: {log}")
    instructions = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    tensor_cores = next((word for word in reversed(instructions.values()) if word in ptx), "")
    spills = int(spilled[1]) + int(spilled[2])
    return {
        **common,
        **accesses(ptx),
        "registers": int(registers[1]),
        "spills": spills,
        "tensor_cores": tensor_cores,
    }


def accesses(ptx: str) -> dict[str, int]:
    """Instructions that read and write global memory: 16 bytes a thread, or less."""
    found = {"wide reads": 0, "narrow reads": 0, "wide writes": 0, "narrow writes": 0}
    for kind, line in re.findall(r"\b(ld|st)\.global(\S*)", ptx):
        found[f"{'wide' if '.v4' in line else 'narrow'} {'reads' if kind == 'ld' else 'writes'}"] += 1
    return found


if __name__ == "__main__":
    wanted = parse(sys.argv[1])
    triton.runtime.driver.set_active(Device(wanted))
    # `arch` is imported by name where it is used.
    for module in (backend, triton_backward, triton_column_mass, triton_query_blur):
        module.arch = lambda device: int(wanted.arch) if wanted.backend == "cuda" else 0
    json.dump([{"case": case, "kernels": compile_case(*case)} for case in json.load(sys.stdin)], sys.stdout)

"""Compiles what a call would launch, for a GPU that is not there: registers, spills, shared memory, tensor
cores.

    python -m support.compile_kernels TARGET < cases.json > report.json

TARGET: sm_90, gfx942 ... A case is [operator, variant, head dim, dtype]. Kernels must be compiled in a
process that did not choose Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
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
from flashbrush.kernels.attention import tiles as attention_tiles

from .small_operator_calls import SMALL_OPERATOR_CALLS

# As Triton itself calls it. From 3.7 on it works around a fault of ptxas 13.
PTXAS_OPTIONS = ["-lineinfo", "-v"] + (
    ["--regAllocOptLevel=2"] if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else []
)
CONTROLS = {
    "plain": {},
    "weighted": {"weight": {("b", "a"): 1.3}},
    "brush": {"weight": {("b", "a"): 1.3}, "head_gain": fb.HeadGain(rows="b", keys="a")},
    "groups": {"groups": {"x": ["a"], "y": ["b"]}, "gates": {"x": 0.8}},
    "words": {"weight": {("*", f"w{i}"): 1 + i / 77 for i in range(77)}},
    "contrast": {"contrast": fb.Contrast(1.67, None)},
    "clip": {"contrast": fb.Contrast(1.67, (0.0, 1.0))},
}

# Launch options that no tile uses by itself: a variant "words, tma" forces them.
FORCED = {"tma": {"descriptors": True}}


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


def problem_of(variant: str, dim: int, dtype: torch.dtype) -> Problem:
    """A call of 512 rows and keys whose control is CONTROLS[variant]; the other variants are below."""

    def make(batch: int, tokens: int, heads: int) -> torch.Tensor:
        return torch.zeros(batch, tokens, heads, dim, dtype=dtype)

    rows = fb.Segments(a=256, b=256)
    keys = fb.Segments({f"w{i}": 1 for i in range(77)}) if variant == "words" else rows
    if variant == "key list":
        control = fb.Control(rows, keys, weight={("b", "a"): 1.3}, bias={("a", "b"): -1.0})
        k, v = ([make(1, 256, 2), make(1, 256, 2)] for _ in range(2))
        return lower(make(1, 512, 4), k, v, control)
    if variant == "items":  # lengths, tables, scales and sources that differ from item to item
        lengths = fb.Segments(a=torch.tensor([200, 256, 1]), b=torch.tensor([312, 256, 511]))
        tables = {
            "weight": {("b", "a"): torch.full((3, 4), 1.3)},
            "bias": {("a", "b"): torch.full((3, 4), -1.0)},
            "gain": {"b": torch.full((3, 4), 0.9)},
            "valid": {"b": torch.tensor([100, 256, 7])},
        }
        control = fb.Control(lengths, **tables)
        source = {name: torch.tensor([0, 1, 1]) for name in ("q", "k", "v")}
        tensors = make(2, 512, 4), make(2, 512, 4), make(2, 512, 4)
        return lower(*tensors, control, torch.full((3, 4), 0.1), source)
    q, k, v = make(1, 512, 4), make(1, keys.total, 4), make(1, keys.total, 4)
    options = CONTROLS.get(variant, CONTROLS["weighted"])
    return lower(q, k, v, fb.Control(rows, keys, **options))


def backward(p: Problem) -> None:
    lse = torch.zeros(p.batch, p.heads, p.rows, p.n_groups)
    gain = torch.ones(p.batch, p.heads, len(p.row_lengths))
    triton_backward.backward(p, torch.zeros_like(p.q), torch.zeros_like(p.q), lse, gain)


def column_mass(p: Problem) -> None:
    p = p.changed(weight=None, gain=None, gates=None)  # the operator takes what decides the map
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


@contextlib.contextmanager
def forced_options(options: dict) -> Iterator[None]:
    """Every forward tile with some launch options replaced."""
    chosen = attention_tiles.forward_tile
    attention_tiles.forward_tile = lambda *args, **more: chosen(*args, **more)._replace(**options)
    try:
        yield
    finally:
        attention_tiles.forward_tile = chosen


def call(operator: str, variant: str, dim: int, dtype: torch.dtype) -> None:
    if operator in ATTENTION:
        variant, _, forced = variant.partition(", ")
        with forced_options(FORCED[forced] if forced else {}):
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
    common = {"shared": metadata.shared, "warps": metadata.num_warps, **specialization(kernel)}
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
    instructions = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    tensor_cores = next((word for word in reversed(instructions.values()) if word in ptx), "")
    code = code_digest(kernel.asm["ttgir"])
    return {**common, **accesses(ptx), **assemble(ptx), "tensor_cores": tensor_cores, "code": code}


def assemble(ptx: str) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and of its spills, by ptxas."""
    target = re.search(r"\.target (sm_(\d+)\w*)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        ptxas = [get_ptxas(int(target[2])).path, *PTXAS_OPTIONS, f"--gpu-name={target[1]}"]
        done = subprocess.run([*ptxas, str(source), "-o", os.devnull], capture_output=True, text=True)
    log = done.stdout + done.stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame", log)
    if done.returncode or spilled is None or registers is None or stack is None:
        raise RuntimeError(f"ptxas: {log}")
    return {
        "registers": int(registers[1]),
        "stack": int(stack[1]),
        "spills": int(spilled[1]) + int(spilled[2]),
    }


def code_digest(ttgir: str) -> str:
    """A digest of Triton's code for the GPU that no name, no location and no order of parameters changes."""
    ttgir = re.sub(r" ?loc\((?:[^()]|\([^()]*\))*\)|^#loc.*\n", "", ttgir, flags=re.M)
    ttgir = re.sub(r"(tt\.func public @\w+)\(.*?\) attributes", r"\1", ttgir, flags=re.S)
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    ttgir = re.sub(r"^#\w+ = .*\n", "", ttgir, flags=re.M)
    ttgir = re.sub(r"#\w+", lambda found: layouts.get(found[0], found[0]), ttgir)
    constants = dict(re.findall(r"^ *(%[\w.-]+) = arith\.constant (.*)$", ttgir, re.M))
    ttgir = re.sub(r"^ *%[\w.-]+ = arith\.constant .*\n", "", ttgir, flags=re.M)
    numbers: dict[str, str] = {}
    count = itertools.count()

    def rename(found: re.Match) -> str:
        value, defines = found[1], found[2] is not None  # sibling blocks define the same names again
        if value in constants:
            return constants[value]
        if defines or value not in numbers:
            numbers[value] = f"%{next(count)}"
        return numbers[value]

    ttgir = re.sub(r"(%[\w.-]+)((?=(?::\d+)? = )|(?=: [a-z]))?", rename, ttgir)
    return hashlib.sha256(ttgir.encode()).hexdigest()[:12]


def specialization(kernel) -> dict[str, int]:
    """Run-time arguments of a kernel, and those that it was compiled for as multiples of 16."""
    types = list(flat(tuple(kernel.src.signature.values())))
    divisible = sum(
        any(name == "tt.divisibility" for name, _ in found) for found in kernel.src.attrs.values()
    )
    return {"arguments": sum(t != "constexpr" for t in types), "multiples of 16": divisible}


def flat(types: tuple) -> Iterator[str]:
    for t in types:
        if isinstance(t, tuple):
            yield from flat(t)
        else:
            yield t


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

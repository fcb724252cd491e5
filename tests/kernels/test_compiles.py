"""The Triton kernels compiled for GPUs that are not there: tensor cores in use, no spilled register, memory that fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may ask for
CASES = [
    *((control, dim, "bfloat16") for dim in (64, 128) for control in ("plain", "weighted", "brush", "groups", "clip")),
    ("contrast", 128, "float16"),
    ("plain", 80, "bfloat16"),
    ("brush", 256, "float16"),
    ("clip", 128, "float32"),
    ("brush", 64, "float32"),
]


@pytest.fixture(scope="module", params=sorted(SHARED))
def compiled(request: pytest.FixtureRequest) -> tuple[int, list[dict]]:
    """Reports of all cases, from a process that compiles where this one may interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "support.compile_kernels", str(request.param)],
        input=json.dumps(CASES), capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, json.loads(done.stdout)


def test_forward_kernels_fit(compiled: tuple[int, list[dict]]) -> None:
    arch, reports = compiled
    assert len(reports) == len(CASES)
    for report in reports:
        for kernel in report["kernels"]:
            where = f"sm_{arch} {report['case']} {kernel}"
            print(where)
            assert kernel["shared"] <= SHARED[arch], where
            if report["case"][1] <= 128:
                assert kernel["spills"] == 0, where


def test_tensor_cores(compiled: tuple[int, list[dict]]) -> None:
    arch, reports = compiled
    for report in reports:
        forward = [kernel for kernel in report["kernels"] if kernel["kernel"] == "attention_forward_kernel"]
        assert len(forward) == 1
        if report["case"][2] != "float32":
            assert forward[0]["wgmma" if arch == 90 else "mma"], f"sm_{arch} {report['case']}"


def test_a_control_launches_only_light_kernels_more(compiled: tuple[int, list[dict]]) -> None:
    _, reports = compiled
    launched = {tuple(report["case"]): [k["kernel"] for k in report["kernels"]] for report in reports}
    assert launched["plain", 128, "bfloat16"] == launched["weighted", 128, "bfloat16"] == ["attention_forward_kernel"]
    light = ["sum_mass_kernel", "head_gain_kernel", "scale_rows_kernel"]
    assert launched["brush", 128, "bfloat16"] == ["attention_forward_kernel", *light]

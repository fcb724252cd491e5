"""The GPU's checks and rows, on the CPU: a wrong or broken kernel of ours is a failure and gets no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashbrush as fb
from flashbrush.benchmarks.cases import contestants
from flashbrush.benchmarks.cases.float64_check import ExpectedRows
from flashbrush.benchmarks.cases.inputs import draw_case
from flashbrush.benchmarks.gpu import (
    backward,
    checks,
    contestants as gpu_contestants,
    cuda_builds,
    flux_layer,
    forward,
    plan as gpu_plan,
    setup as gpu_setup,
)
from flashbrush.benchmarks.gpu.controls import CUDA, case_with_control, with_control
from flashbrush.benchmarks.gpu.shapes import GPU_SHAPES, dry

SETUP = gpu_setup.Setup(torch.device("cpu"), "composed" if fb.backends()["cpu"] else "cpu", dry=True)


def with_a_wrong_last_row(attention):
    def wrong(*arguments, **keywords):
        result = attention(*arguments, **keywords)
        out = result[0] if isinstance(result, tuple) else result
        out[:, -1] += 0.5
        return result

    return wrong


def test_a_wrong_feature_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "attention", with_a_wrong_last_row(fb.attention))
    row: Any = checks.features(SETUP, ("plain", "strides"))
    assert set(row["failures"]) == {"plain", "strides"} and not row["errors"]


def test_an_error_of_ours_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments, **keywords):
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(checks, "attention", broken)
    monkeypatch.setattr(contestants, "attention", broken)
    row: Any = checks.features(SETUP, ("plain",))
    assert row["failures"] == {"plain": "RuntimeError: out of registers"}
    row = forward.measure(SETUP, GPU_SHAPES["flux-1024"], forward.main_entries(SETUP))
    assert {"plain", "shift", "brush"} <= set(row["failures"]) and "sdpa" in row["seconds"]
    assert not {"plain", "shift", "brush"} & {*row["seconds"], *row["errors"], *row["memory"]}


def test_a_wrong_layer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flux_layer, "attention", with_a_wrong_last_row(fb.attention))
    row: Any = flux_layer.measure(SETUP, GPU_SHAPES["flux-1024"])
    names = {"plain", "plain_in_place", "controlled", "controlled_in_place"}
    assert set(row["failures"]) == names and not names & set(row["seconds"])


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backward, "attention", lambda q, k, v, **more: fb.attention(q, k, v, **more) + 0.3 * q
    )
    row: Any = backward.measure(SETUP, GPU_SHAPES["flux-1024"])
    assert set(row["failures"]) == set(backward.OURS) and set(row["seconds"]) == {"flash"}


def test_without_the_cuda_backend() -> None:
    setup = replace(SETUP, cuda=False)
    row: Any = forward.measure(setup, GPU_SHAPES["flux-1024"], forward.main_entries(setup))
    left_out = {name: row["missing"][name] for name in CUDA if name in row["missing"]}
    assert left_out == dict.fromkeys(("cuda_plain", "cuda_shift", "cuda_brush"), gpu_setup.NO_CUDA)
    on_cuda = [task.run(setup) for task in gpu_plan.tasks() if task.cuda and task.apart]
    assert on_cuda and all(check == {"missing": {"cuda": gpu_setup.NO_CUDA}} for check in on_cuda)


@pytest.mark.parametrize("control", ["shift", "brush"])
def test_the_composed_form_is_right(control: str) -> None:
    case = case_with_control(draw_case(dry(GPU_SHAPES["sd15-64"]), torch.float32), control)
    call, out = gpu_contestants.composed_forms()["composed_flash"].start(case)
    ExpectedRows(case, True).check("composed", out)
    assert torch.equal(call(), out.transpose(1, 2))


@pytest.mark.compiled
def test_builds_of_the_cuda_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One build for each head dim where nvcc is installed, and one that does not compile."""
    builder = cuda_builds.load_builder()
    try:
        builder["find_cuda_compiler"]()
    except builder["BuildError"] as error:
        pytest.skip(str(error))
    monkeypatch.setattr(cuda_builds, "FOLDER", tmp_path / "variants")
    chosen = {dim: dict(list(builds.items())[-1:]) for dim, builds in cuda_builds.BUILDS.items()}
    chosen[64]["none"] = {"KEYS_64": 7}
    monkeypatch.setattr(cuda_builds, "BUILDS", chosen)
    row = cuda_builds.compile_all(replace(SETUP, build=True))
    assert set(row["missing"]) == {"64, none"} and set(row["built"]) == {"128, no overlap", "64, no overlap"}
    assert all(len(report["kernels"]) == 1 and report["warnings"] == [] for report in row["built"].values())
    assert sorted(p.name for p in (tmp_path / "variants").iterdir()) == ["128-0.so", "64-0.so"]


def test_checks_are_one_block_after_the_ceilings() -> None:
    """So the plan has three phases: alone, side by side, alone again."""
    plan = gpu_plan.tasks()
    apart = [i for i, task in enumerate(plan) if task.apart]
    assert apart == list(range(1, len(apart) + 1)) and plan[0].section == "ceilings"


def test_shapes_and_controls() -> None:
    sizes = {shape.size for shape in GPU_SHAPES.values()}
    assert sizes == {
        "(1,24,4608,128)",
        "(1,24,5120,128)",
        "(1,24,8704,128)",
        "(8,8,4096,40)",
        "(8,8,1024,80)",
        "(2,24,4429,64)",
        "(1,24,16384,128)",
        "(1,24,65536,128)",
    }
    quarter = with_control(GPU_SHAPES["flux-768-diptych"], "quarter")
    assert (quarter.n_rows, quarter.n_keys) == (1280, 5120)
    with pytest.raises(ValueError, match="sideways"):
        with_control(quarter, "sideways")
    with pytest.raises(ValueError, match="sideways"):
        gpu_plan.tasks(["sideways"])


def test_a_ratio_below_one_means_that_ours_is_faster() -> None:
    found = forward.ratios({"plain": [1.0], "brush": [2.0], "cudnn": [4.0], "flash": [8.0], "eager": [16.0]})
    medians = {name: spread.median for name, spread in found.items()}
    assert medians == {
        "brush/plain": 2.0,
        "plain/cudnn": 0.25,
        "plain/flash": 0.125,
        "brush/cudnn": 0.5,
        "brush/flash": 0.25,
        "brush/eager": 0.125,
        "plain/vendor": 0.25,
        "brush/vendor": 0.5,
    }

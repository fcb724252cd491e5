"""benchmarks/gpu/run.py as a dry run on the CPU: the whole plan, its files, and its arguments."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashbrush as fb
from flashbrush.benchmarks.gpu import plan as gpu_plan, report as gpu_report, run as gpu
from flashbrush.benchmarks.gpu.shapes import GPU_SHAPES
from flashbrush.integrations.evaluation import machine

SCRIPT = machine.ROOT / "benchmarks" / "gpu" / "run.py"
# Contestants for --peers: two wrong ones, a right one, and one that cannot run.
CONTESTANTS = """
import torch
from flashbrush.benchmarks.cases.contestants import Contestant, Missing

def sdpa(case):
    return torch.nn.functional.scaled_dot_product_attention(*case.heads_first())

def one_wrong_element(case):
    def call():
        out = sdpa(case)
        out[:, :, -1, 3] += 0.5
        return out
    return call, True

def not_a_number(case):
    return lambda: sdpa(case) * float("nan"), True

def right(case):
    return lambda: sdpa(case), True

def absent(case):
    raise Missing("it is not installed")

def contestants():
    kinds = dict(one_wrong_element=one_wrong_element, not_a_number=not_a_number, right=right, absent=absent)
    return {name: Contestant(name, name, False, prepare) for name, prepare in kinds.items()}
"""
WRONG = {"one_wrong_element", "not_a_number"}


def run(*arguments: str | Path, expect: int = 0, cwd: Path | None = None, module: bool = False) -> str:
    """The command in a process of its own; returns what it printed."""
    how = ["-m", gpu.MODULE] if module else [str(SCRIPT)]
    done = subprocess.run(
        [sys.executable, *how, *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=cwd or machine.ROOT,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """The files and the output of one dry run of everything, with the contestants above."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "more.py").write_text(CONTESTANTS)
    return folder / "out", run("--dry-run", "--peers", folder / "more.py", "--out", folder / "out", expect=1)


@pytest.fixture(scope="module")
def results(whole: tuple[Path, str]) -> dict:
    return json.loads((whole[0] / "gpu-dry-run.json").read_text())


def test_every_task_gives_a_row(whole: tuple[Path, str], results: dict) -> None:
    assert results["schema"] == gpu_report.SCHEMA and results["conditions"]["dry_run"]
    assert {"gpu", "torch", "triton", "python", "commit", "date"} <= set(results["machine"])
    plan = gpu_plan.tasks()
    assert [(r["section"], r["name"]) for r in results["rows"]] == [(t.section, t.title) for t in plan]
    assert not results["skipped"] and {"cudnn", "efficient", "xformers"} <= set(results["missing"])
    for row in results["rows"]:
        assert row["took"] >= 0  # seconds, to a hundredth
        for name, cell in row.get("seconds", {}).items():
            assert len(cell["samples"]) == cell["n"] >= 7
            assert 0 < cell["min"] <= cell["q1"] <= cell["median"] <= cell["q3"] <= cell["max"]
            assert row["section"] == "ceilings" or name in row["errors"]  # everything timed was checked
    assert "missing: cudnn" in whole[1]


def test_a_wrong_contestant_is_listed_and_not_timed(whole: tuple[Path, str], results: dict) -> None:
    """The others of its row are timed, and the exit code is 1 (see the fixture)."""
    for row in results["rows"]:
        assert set(row.get("failures", {})) == (WRONG if row["section"] == "forward" else set())
    for row in (r for r in results["rows"] if r["section"] == "forward"):
        failures = row["failures"]
        assert "error" in failures["one_wrong_element"] and "not finite" in failures["not_a_number"]
        for field in ("seconds", "tflops", "errors", "memory", "ratios"):
            assert not any(name.startswith(tuple(WRONG)) for name in row[field])
        assert {"right", "plain", "brush", "sdpa"} <= set(row["seconds"])
    assert results["missing"]["absent"] == "it is not installed"
    assert len(results["failures"]) == 2 * len(GPU_SHAPES)
    assert "WRONG: forward, flux-1024: one_wrong_element" in whole[1]
    assert "missing: absent: it is not installed" in whole[1]


def test_ratios_of_each_section(results: dict) -> None:
    rows = results["rows"]
    of = {section: [r for r in rows if r["section"] == section] for section in gpu_plan.SECTIONS}
    wanted = "plain/vendor brush/vendor brush/plain shift/plain brush/composed brush/eager"
    for row in of["forward"]:
        assert set(wanted.split()) <= set(row["ratios"]) and row["shape"]["name"] == row["name"]
    assert {r["name"] for r in of["forward"]} == set(GPU_SHAPES)
    assert {"groups/composed_groups", "quarter/plain"} <= set(of["features"][0]["ratios"])
    if not fb.backends()["cpu"]:
        assert "contrast/eager_contrast" in of["features"][0]["ratios"]
    assert {"plain/vendor", "brush/vendor"} <= set(of["backward"][0]["ratios"])
    assert {"controlled/fastest stock", "controlled_in_place/stock"} <= set(of["layer"][0]["ratios"])
    assert {"plain/flex", "brush/composed_flash"} <= set(of["compiled"][0]["ratios"])
    operators = "qk_norm_rope blend_latents adain query_blur column_mass"
    assert [r["name"] for r in of["around"]] == operators.split()
    if importlib.util.find_spec("diffusers") is not None:
        assert all(row["stock_against_diffusers"] <= 1e-5 for row in of["layer"])


def test_csv_and_plots(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    with (folder / "gpu-dry-run.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == gpu_report.COLUMNS
    assert {line["status"] for line in lines} == {"right", "wrong", "missing"}
    assert all(bool(line["note"]) == (line["status"] != "right") for line in lines)
    wrong = [line for line in lines if line["status"] == "wrong"]
    assert len(wrong) == 2 * len(GPU_SHAPES)
    assert not any(line["median_ms"] or line["tflops"] for line in wrong)
    timed = [line for line in lines if line["section"] == "forward" and line["status"] == "right"]
    assert timed and all(float(line["median_ms"]) > 0 and float(line["max_error"]) >= 0 for line in timed)
    if importlib.util.find_spec("matplotlib") is not None:
        for name in ("tflops.png", "ratios.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_runs_as_a_module_from_another_folder(tmp_path: Path) -> None:
    run("--dry-run", "--sections", "ceilings", "--out", "here", cwd=tmp_path, module=True)
    assert (tmp_path / "here" / "gpu-dry-run.json").exists()


def test_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """The file's own checkout is imported, whatever is installed and wherever it is called from."""
    code = f"sys.argv = ['run.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    # -S: without the site's start files an editable install is not found.
    paths = [p for p in sys.path if "site-packages" in p]
    code = f"import runpy, sys; sys.path += {paths!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], text=True, capture_output=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "sideways"], "sideways"),
        (["--dry-run", "--minutes", "0"], "--minutes"),
        (["--dry-run", "--jobs", "-1"], "--jobs"),
        (["--dry-run", "--backend", "abacus"], "abacus"),
        (["--dry-run", "--peers", "nothing.py"], "nothing.py"),
        (["--dry-run", "--peers", str(Path(__file__))], "contestants"),
    ],
)
def test_wrong_arguments(capsys, arguments: list[str], message: str) -> None:
    try:
        code = gpu.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(capsys) -> None:
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err

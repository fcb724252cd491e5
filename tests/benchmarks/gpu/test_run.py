"""The GPU's command on the CPU: the whole plan, its files, and that nothing wrong, missing or skipped goes
unsaid.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashbrush as fb
from flashbrush.benchmarks.cases import dense
from flashbrush.benchmarks.cases.truth import Truth, WrongResult
from flashbrush.benchmarks.cpu import peers
from flashbrush.benchmarks.gpu import (
    backward as gpu_backward,
    checks as gpu_checks,
    forward as gpu_forward,
    layer as gpu_layer,
    machine as gpu_machine,
    peers as gpu_peers,
    plan as gpu_plan,
    report as gpu_report,
    run as gpu,
    runner as gpu_runner,
    shapes as gpu_shapes,
    timing as gpu_timing,
    variants as gpu_variants,
)
from flashbrush.benchmarks.gpu.shapes import GPU_SHAPES, VARIANTS, dry, variant, vary
from flashbrush.integrations.evaluation import machine

SCRIPT = machine.ROOT / "benchmarks" / "gpu" / "run.py"
SETUP = gpu_machine.Setup(torch.device("cpu"), "composed" if fb.backends()["cpu"] else "cpu", dry=True)
WRONG = """
import torch
from flashbrush.benchmarks.cpu.peers import Missing, Peer

def sdpa(case):
    return torch.nn.functional.scaled_dot_product_attention(*case.heads_first())

def off_by_a_little(case):
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
    raise Missing("it was left at home")

def contestants():
    kinds = dict(off_by_a_little=off_by_a_little, not_a_number=not_a_number, right=right, absent=absent)
    return {name: Peer(name, name, False, prepare) for name, prepare in kinds.items()}
"""
FATAL = """
import os, time
from flashbrush.benchmarks.cpu.peers import Peer

def fatal(case):
    if case.shape.name == "flux-768-diptych":
        os._exit(9)
    if case.shape.name == "flux-1024":
        time.sleep(600)
    raise RuntimeError("no luck")

def contestants():
    return {"fatal": Peer("fatal", "fatal", False, fatal)}
"""


def run(*arguments: str | Path, expect: int = 0, cwd: Path | None = None, module: bool = False) -> str:
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
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, run("--dry-run", "--out", folder)


def test_the_whole_plan(whole: tuple[Path, str]) -> None:
    folder, screen = whole
    results = json.loads((folder / "gpu-dry-run.json").read_text())
    assert results["schema"] == gpu_report.SCHEMA and results["conditions"]["dry_run"]
    assert {"gpu", "torch", "triton", "python", "commit", "date"} <= set(results["machine"])
    plan = gpu_plan.tasks()
    assert [(r["section"], r["name"]) for r in results["rows"]] == [(t.section, t.title) for t in plan]
    assert not results["failures"] and not results["skipped"]
    assert {"cudnn", "efficient", "xformers"} <= set(results["missing"])
    for row in results["rows"]:
        assert row["took"] >= 0  # seconds, to a hundredth
        for name, cell in row.get("seconds", {}).items():
            assert len(cell["samples"]) == cell["n"] >= 7
            assert 0 < cell["min"] <= cell["q1"] <= cell["median"] <= cell["q3"] <= cell["max"]
            assert row["section"] == "ceilings" or name in row["errors"]  # nothing unchecked has a time
    assert "WRONG" not in screen and "missing: cudnn" in screen


def test_every_ratio_that_matters(whole: tuple[Path, str]) -> None:
    rows = json.loads((whole[0] / "gpu-dry-run.json").read_text())["rows"]
    of = {section: [r for r in rows if r["section"] == section] for section in gpu_plan.SECTIONS}
    for row in of["forward"]:
        wanted = {
            "plain/vendor",
            "brush/vendor",
            "brush/plain",
            "shift/plain",
            "brush/composed",
            "brush/eager",
        }
        assert wanted <= set(row["ratios"]) and row["shape"]["name"] == row["name"]
    assert {r["name"] for r in of["forward"]} == set(GPU_SHAPES)
    assert {"groups/composed_groups", "quarter/plain"} <= set(of["features"][0]["ratios"])
    if SETUP.backend == "cpu":
        assert "contrast/eager_contrast" in of["features"][0]["ratios"]
    assert {"plain/vendor", "brush/vendor"} <= set(of["backward"][0]["ratios"])
    assert {"controlled/fastest stock", "controlled_in_place/stock"} <= set(of["layer"][0]["ratios"])
    assert {"plain/flex", "brush/composed_flash"} <= set(of["compiled"][0]["ratios"])
    assert [r["name"] for r in of["around"]] == [
        "qk_norm_rope",
        "blend_latents",
        "adain",
        "query_blur",
        "column_mass",
    ]
    if importlib.util.find_spec("diffusers") is not None:
        assert all(row["stock_against_diffusers"] <= 1e-5 for row in of["layer"])


def test_tables_and_plots(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    with (folder / "gpu-dry-run.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == gpu_report.COLUMNS
    assert {line["status"] for line in lines} == {"right", "missing"}
    assert all(bool(line["note"]) == (line["status"] == "missing") for line in lines)
    timed = [line for line in lines if line["section"] == "forward" and line["status"] == "right"]
    assert timed and all(float(line["median_ms"]) > 0 and float(line["max_error"]) >= 0 for line in timed)
    if importlib.util.find_spec("matplotlib") is not None:
        for name in ("tflops.png", "ratios.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_wrong_contestants_are_caught(tmp_path: Path) -> None:
    """The others of the row are timed all the same, and the exit code tells."""
    (tmp_path / "more.py").write_text(WRONG)
    arguments = ("--dry-run", "--sections", "forward", "--peers", tmp_path / "more.py", "--out", tmp_path)
    screen = run(*arguments, expect=1)
    results = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    for row in results["rows"]:
        assert set(row["failures"]) == {"off_by_a_little", "not_a_number"}
        assert (
            "error" in row["failures"]["off_by_a_little"] and "not finite" in row["failures"]["not_a_number"]
        )
        for field in ("seconds", "tflops", "errors", "memory", "ratios"):
            assert not any("off_by" in name or "not_a" in name for name in row[field])
        assert {"right", "plain", "brush", "sdpa"} <= set(row["seconds"])
    assert results["missing"]["absent"] == "it was left at home"
    assert len(results["failures"]) == 2 * len(GPU_SHAPES)
    with (tmp_path / "gpu-dry-run.csv").open() as file:
        wrong = [line for line in csv.DictReader(file) if line["status"] == "wrong"]
    assert len(wrong) == 2 * len(GPU_SHAPES) and not any(
        line["median_ms"] or line["tflops"] for line in wrong
    )
    assert (
        "WRONG: forward, flux-1024: off_by_a_little" in screen
        and "missing: absent: it was left at home" in screen
    )


def test_the_budget_skips(tmp_path: Path) -> None:
    started = time.time()
    screen = run("--dry-run", "--minutes", "0.001", "--out", tmp_path)
    results = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert len(results["skipped"]) == len(results["rows"]) == len(gpu_plan.tasks())
    assert "skipped: forward, tokens-64k: the time did not suffice" in screen
    assert time.time() - started < 60 and not any("seconds" in row for row in results["rows"])


def test_a_crash_and_a_hang_cost_their_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more.py").write_text(FATAL)
    plan = gpu_plan.tasks(["forward"])
    # The process that runs the plan knows its own limits.
    shortened = [
        ShortTask(t.section, t.title, t.run, t.seconds) if t.title == "flux-1024" else t for t in plan
    ]
    found: dict[int, dict] = {}
    command = gpu_runner.python_command(
        SCRIPT,
        ["--dry-run", "--sections", "forward", "--peers", str(tmp_path / "more.py")],
        time.time() + 120,
    )
    gpu_runner.supervise(command, shortened, time.time() + 120, 1, found.__setitem__, lambda machine: None)
    assert sorted(found) == list(range(len(plan)))
    rows = {plan[i].title: row for i, row in found.items()}
    died, hung = rows.pop("flux-768-diptych"), rows.pop("flux-1024")
    # The first to die is made once more without the cuda backend, which was not at fault.
    why = "the process ended with exit code 9"
    assert died == {"failures": {"flux-768-diptych": why, "cuda": why}}
    assert hung == {"failures": {"flux-1024": "no result after 2 s"}}
    for row in rows.values():
        assert row["missing"]["fatal"] == "RuntimeError: no luck" and not row["failures"]
        assert {"plain", "brush"} <= set(row["seconds"])


class ShortTask(gpu_plan.Task):
    limit = 2.0  # type: ignore[assignment]


@pytest.mark.parametrize("how", ["lost", "exit", "hang"])
def test_what_does_not_survive_the_cuda_backend_goes_on_without(how: str) -> None:
    """A check of it has failed then; a row that was being timed is made once more, and the next ones without
    it too.
    """
    script = """
import json, sys, time
how, *rest = sys.argv[1:]
with open(rest[rest.index("--worker") + 1], "a") as file:
    for index in map(int, rest[rest.index("--tasks") + 1].split(",")):
        print(json.dumps({"index": index, "begun": True}), file=file, flush=True)
        if "--no-cuda" not in rest:
            if how == "hang":
                time.sleep(60)
            if how == "lost":
                print(json.dumps({"index": index, "lost": "an illegal address"}), file=file, flush=True)
            sys.exit(3)
        print(json.dumps({"index": index, "row": {"seconds": {}, "failures": {"x": "y"}}}), file=file, flush=True)
"""
    tasks = [ShortTask("checks", "check", lambda _: {}, 1, apart=True, cuda=True)]
    tasks += [ShortTask("forward", str(i), lambda _: {}, 1, cuda=True) for i in range(2)]
    why = {
        "lost": "an illegal address",
        "exit": "the process ended with exit code 3",
        "hang": "no result after 2 s",
    }[how]
    command = [sys.executable, "-c", script, how]
    for plan, expected in (
        (tasks, [{"check": why}, {"x": "y"}, {"x": "y"}]),
        (tasks[1:], [{"x": "y", "cuda": why}, {"x": "y"}]),
    ):
        found: dict[int, dict] = {}
        gpu_runner.supervise(command, plan, time.time() + 60, 2, found.__setitem__, lambda machine: None)
        assert [found[i]["failures"] for i in sorted(found)] == expected


def test_a_lost_device_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "_alive", lambda _: False)
    plan = [gpu_plan.Task("forward", "one", lambda _: {"failures": {"brush": "wrong"}}, 1)]
    assert gpu_runner.work(SETUP, plan, [0], time.time() + 60, tmp_path / "lines") == gpu_runner.LOST
    assert json.loads((tmp_path / "lines").read_text().splitlines()[-1]) == {"index": 0, "lost": "wrong"}


def test_files_of_numbers_that_json_has_not(tmp_path: Path) -> None:
    plan = [gpu_plan.Task("ceilings", "one", lambda _: {}, 1)]
    results = gpu_report.Results(plan, {"dry_run": True}, tmp_path)
    results.add(0, {"errors": {"plain": {"max_error": float("nan"), "all": (float("inf"), 1.0)}}})
    (row,) = json.loads((tmp_path / "gpu-dry-run.json").read_text())["rows"]
    assert row["errors"] == {"plain": {"max_error": "nan", "all": ["inf", 1.0]}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu-dry-run.csv", "gpu-dry-run.json"]


def test_without_the_cuda_backend() -> None:
    setup = replace(SETUP, cuda=False)
    row: Any = gpu_forward.measure(setup, GPU_SHAPES["flux-1024"], gpu_forward.main_entries(setup))
    assert {
        name: row["missing"][name] for name in gpu_shapes.CUDA if name in row["missing"]
    } == dict.fromkeys(("cuda_plain", "cuda_shift", "cuda_brush"), gpu_machine.NO_CUDA)
    checks = [task.run(setup) for task in gpu_plan.tasks() if task.cuda and task.apart]
    assert checks and all(check == {"missing": {"cuda": gpu_machine.NO_CUDA}} for check in checks)


def test_variants_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each head dim, of the plain kernel alone, where nvcc is."""
    builder = gpu_variants.load_builder()
    try:
        builder["find_cuda_compiler"]()
    except builder["BuildError"] as error:
        pytest.skip(str(error))
    monkeypatch.setattr(gpu_variants, "FOLDER", tmp_path / "variants")
    chosen = {dim: dict(list(variants.items())[-1:]) for dim, variants in gpu_variants.VARIANTS.items()}
    chosen[64]["none"] = {"KEYS_64": 7}
    monkeypatch.setattr(gpu_variants, "VARIANTS", chosen)
    row = gpu_variants.compile_all(replace(SETUP, build=True))
    assert set(row["missing"]) == {"64, none"} and set(row["built"]) == {"128, no overlap", "64, no overlap"}
    assert all(len(report["kernels"]) == 1 and report["warnings"] == [] for report in row["built"].values())
    assert sorted(p.name for p in (tmp_path / "variants").iterdir()) == ["128-0.so", "64-0.so"]


def test_a_process_that_does_not_start(tmp_path: Path) -> None:
    found: dict[int, dict] = {}
    plan = gpu_plan.tasks(["around"])
    command = [sys.executable, "-c", "raise SystemExit(5)"]
    gpu_runner.supervise(command, plan, time.time() + 60, 1, found.__setitem__, lambda machine: None)
    assert len(found) == len(plan) and all("exit code 5" in str(row["failures"]) for row in found.values())


def test_checks_run_side_by_side_and_the_rest_alone() -> None:
    """Three phases: what comes before the checks, the checks, what comes after."""
    plan = gpu_plan.tasks()
    apart = [i for i, task in enumerate(plan) if task.apart]
    assert apart == list(range(1, len(apart) + 1)) and plan[0].section == "ceilings"


def test_as_a_module_from_elsewhere(tmp_path: Path) -> None:
    arguments = ("--dry-run", "--sections", "ceilings", "--out", "here")
    run(*arguments, cwd=tmp_path, module=True)
    assert (tmp_path / "here" / "gpu-dry-run.json").exists()


def test_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """The checkout that the file is in is what is measured, whatever else is installed and wherever it is
    called.
    """
    code = f"import runpy, sys; sys.argv = ['run.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    # Without the site's start files an editable install is not found.
    paths = [p for p in sys.path if "site-packages" in p]
    code = f"import sys; sys.path += {paths!r}\n{code}"
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
def test_without_a_gpu(capsys) -> None:
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


# The truths of the checks


@pytest.mark.parametrize("feature", gpu_checks.FEATURES)
def test_the_dense_formula_is_the_reference(feature: str) -> None:
    """Written twice, from the formula and from what a user passes: by the benchmark, and by the reference
    backend.
    """
    p = gpu_checks.draw(SETUP, feature, torch.float64, 16)
    exact = dense.answer(p, torch.float64)
    out, stats = fb.attention(
        p.q, p.k, p.v, p.control(), backend="reference", return_stats=True, **p.keywords
    )
    assert torch.allclose(out, exact.out, rtol=0, atol=1e-6)  # the tables are float32
    assert torch.allclose(stats.lse.double(), exact.lse, rtol=0, atol=1e-5)
    assert torch.allclose(stats.mass.double(), exact.mass, rtol=1e-6, atol=1e-6)
    assert torch.allclose(stats.gain.double(), exact.gain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", ["flux-1024", "sd15-64"])
def test_truth_of_the_variants_is_the_reference(shape: str, name: str) -> None:
    case = vary(peers.draw(dry(GPU_SHAPES[shape]), torch.bfloat16), name)
    truth = Truth(case, name != "plain")
    q, k, v = (t.double() for t in (case.q, case.k, case.v))
    out = fb.attention(q, k, v, case.control, backend="reference")
    assert torch.allclose(out[:, truth.rows], truth.exact, rtol=0, atol=1e-6)


def test_truth_goes_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = vary(peers.draw(dry(GPU_SHAPES["flux-1024"]), torch.bfloat16), "brush")
    whole, gradients = Truth(case, True), gpu_backward.Gradients(case)
    monkeypatch.setattr("flashbrush.benchmarks.cases.truth.CHUNK", 300)
    assert torch.allclose(Truth(case, True).exact, whole.exact, rtol=0, atol=1e-12)
    for name in ("dq", "dk", "dv"):
        again = gpu_backward.Gradients(case)
        assert torch.allclose(getattr(again, name), getattr(gradients, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", gpu_backward.OURS)
def test_gradients_are_autograd_s(name: str) -> None:
    case = vary(peers.draw(dry(GPU_SHAPES["flux-1024"]), torch.bfloat16), name)
    truth = gpu_backward.Gradients(case)
    leaves = [t.double().requires_grad_() for t in (case.q, case.k, case.v)]
    out = fb.attention(*leaves, case.control, backend="reference")  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, leaves, gpu_backward.output_gradient(case).double())
    for grad, expected in zip(grads, (truth.dq, truth.dk, truth.dv), strict=True):
        assert torch.allclose(grad[:, truth.rows], expected, rtol=0, atol=1e-6)
    report = truth.check("itself", tuple(g.float() for g in grads), None)
    assert all(cell["max_error"] < 1e-5 for cell in report.values())
    spoiled = (grads[0], grads[1] + 0.1 * grads[1].abs().max(), grads[2])
    with pytest.raises(WrongResult, match="gradient of k"):
        truth.check("spoiled", spoiled, None)


@pytest.mark.parametrize("vendor", ["flash"])
@pytest.mark.parametrize("name", ["shift", "brush"])
def test_composed_forms_are_right(vendor: str, name: str) -> None:
    case = vary(peers.draw(dry(GPU_SHAPES["sd15-64"]), torch.float32), name)
    call, out = gpu_peers.composed_forms()[f"composed_{vendor}"].start(case)
    Truth(case, True).check("composed", out)
    assert torch.equal(call(), out.transpose(1, 2))


def test_a_wrong_feature_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "attention", spoil(fb.attention))
    row = gpu_checks.features(SETUP, ("plain", "strides"))
    assert set(row["failures"]) == {"plain", "strides"} and not row["errors"]  # type: ignore[arg-type]


def test_an_error_of_ours_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments, **keywords):
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(gpu_checks, "attention", broken)
    monkeypatch.setattr(peers, "attention", broken)
    row = gpu_checks.features(SETUP, ("plain",))
    assert row["failures"] == {"plain": "RuntimeError: out of registers"}
    row = gpu_forward.measure(SETUP, GPU_SHAPES["flux-1024"], gpu_forward.main_entries(SETUP))
    assert {"plain", "shift", "brush"} <= set(row["failures"]) and "sdpa" in row["seconds"]  # type: ignore[arg-type]
    assert not {"plain", "shift", "brush"} & {*row["seconds"], *row["errors"], *row["memory"]}  # type: ignore[arg-type]


def test_a_wrong_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_layer, "attention", spoil(fb.attention))
    row = gpu_layer.measure(SETUP, GPU_SHAPES["flux-1024"])
    names = {"plain", "plain_in_place", "controlled", "controlled_in_place"}
    assert set(row["failures"]) == names and not names & set(row["seconds"])  # type: ignore[arg-type]


def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_backward, "attention", lambda q, k, v, **more: fb.attention(q, k, v, **more) + 0.3 * q
    )
    row = gpu_backward.measure(SETUP, GPU_SHAPES["flux-1024"])
    assert set(row["failures"]) == set(gpu_backward.OURS) and set(row["seconds"]) == {"flash"}  # type: ignore[arg-type]


def spoil(attention):
    def wrong(*arguments, **keywords):
        result = attention(*arguments, **keywords)
        out = result[0] if isinstance(result, tuple) else result
        out[:, -1] += 0.5
        return result

    return wrong


# Timing and shapes


def test_contestants_take_turns_and_inputs_rotate() -> None:
    order: list[tuple[str, int]] = []
    calls = {n: [lambda n=n, i=i: order.append((n, i)) for i in range(3)] for n in "abc"}
    samples = gpu_timing.interleaved(calls, torch.device("cpu"), 0.0)
    assert all(len(s) == gpu_timing.ROUNDS[0] for s in samples.values())
    rounds = order[9 + 3 :]  # after one call with each set of inputs, and one to see how long it takes
    rounds = [rounds[i : i + 3] for i in range(0, len(rounds), 3)]
    assert all(sorted(n for n, _ in r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(n for n, _ in r) for r in rounds}) > 1
    assert [r[0][1] for r in rounds] == [i % 3 for i in range(len(rounds))]


def test_shapes() -> None:
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
    quarter = variant(GPU_SHAPES["flux-768-diptych"], "quarter")
    assert (quarter.n_rows, quarter.n_keys) == (1280, 5120)
    with pytest.raises(ValueError, match="sideways"):
        variant(quarter, "sideways")
    with pytest.raises(ValueError, match="sideways"):
        gpu_plan.tasks(["sideways"])


def test_fast_means_below_one() -> None:
    found = gpu_forward.ratios(
        {"plain": [1.0], "brush": [2.0], "cudnn": [4.0], "flash": [8.0], "eager": [16.0]}
    )
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


def test_one_device_s_name() -> None:
    assert gpu_machine.slug("NVIDIA H200") == "nvidia-h200"
    assert gpu_machine.slug(None) == "cpu"


def test_eager_forms_of_the_papers() -> None:
    """In float32 they agree with the truth that the fused kernels are held to."""
    for name in ("brush", "groups", "contrast", "contrast_linear"):
        case = vary(peers.draw(dry(GPU_SHAPES["sd15-32"]), torch.float32), name)
        _, out = replace(gpu_peers.EAGER, slack=4.0).start(case)
        Truth(case, True).check(name, out, 4.0)
    with pytest.raises(peers.Missing, match="weights alone"):
        gpu_peers.EAGER.start(vary(peers.draw(dry(GPU_SHAPES["sd15-32"]), torch.float32), "shift"))

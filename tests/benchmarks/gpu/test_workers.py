"""Worker processes: a task that crashes, hangs or loses its device costs its own row only."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from flashbrush.benchmarks.gpu import plan as gpu_plan, setup as gpu_setup, workers
from flashbrush.integrations.evaluation import machine

SCRIPT = machine.ROOT / "benchmarks" / "gpu" / "run.py"
SETUP = gpu_setup.Setup(torch.device("cpu"), "composed", dry=True)
FATAL = """
import os, time
from flashbrush.benchmarks.cases.contestants import Contestant

def fatal(case):
    if case.shape.name == "flux-768-diptych":
        os._exit(9)
    if case.shape.name == "flux-1024":
        time.sleep(600)
    raise RuntimeError("out of luck")

def contestants():
    return {"fatal": Contestant("fatal", "fatal", False, fatal)}
"""


class ShortTask(gpu_plan.Task):
    limit = 2.0  # type: ignore[assignment]


@pytest.mark.slow  # starts the real command three times; the next test takes the same paths with a script
def test_real_tasks_that_crash_and_hang(tmp_path: Path) -> None:
    (tmp_path / "more.py").write_text(FATAL)
    plan = gpu_plan.tasks(["forward"])
    # The supervising process decides the limits.
    shortened = [
        ShortTask(t.section, t.title, t.run, t.seconds) if t.title == "flux-1024" else t for t in plan
    ]
    found: dict[int, dict] = {}
    arguments = ["--dry-run", "--sections", "forward", "--peers", str(tmp_path / "more.py")]
    command = workers.python_command(SCRIPT, arguments, time.time() + 120)
    workers.supervise(command, shortened, time.time() + 120, 1, found.__setitem__, lambda machine: None)
    assert sorted(found) == list(range(len(plan)))
    rows = {plan[i].title: row for i, row in found.items()}
    died, hung = rows.pop("flux-768-diptych"), rows.pop("flux-1024")
    # The first task to crash is repeated without the cuda backend, and crashes again.
    why = "the process ended with exit code 9"
    assert died == {"failures": {"flux-768-diptych": why, "cuda": why}}
    assert hung == {"failures": {"flux-1024": "no result after 2 s"}}
    for row in rows.values():
        assert row["missing"]["fatal"] == "RuntimeError: out of luck" and not row["failures"]
        assert {"plain", "brush"} <= set(row["seconds"])


@pytest.mark.parametrize("how", ["lost", "exit", "hang"])
def test_a_task_that_fails_with_the_cuda_backend_is_repeated_without_it(how: str) -> None:
    """A check has then failed; a timed row is repeated, and later rows leave the cuda backend out."""
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
        row = {"seconds": {}, "failures": {"x": "y"}}
        print(json.dumps({"index": index, "row": row}), file=file, flush=True)
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
        workers.supervise(command, plan, time.time() + 60, 2, found.__setitem__, lambda machine: None)
        assert [found[i]["failures"] for i in sorted(found)] == expected


def test_a_process_that_does_not_start(tmp_path: Path) -> None:
    found: dict[int, dict] = {}
    plan = gpu_plan.tasks(["around"])
    command = [sys.executable, "-c", "raise SystemExit(5)"]
    workers.supervise(command, plan, time.time() + 60, 1, found.__setitem__, lambda machine: None)
    assert len(found) == len(plan) and all("exit code 5" in str(row["failures"]) for row in found.values())


def test_a_lost_device_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_alive", lambda _: False)
    plan = [gpu_plan.Task("forward", "one", lambda _: {"failures": {"brush": "wrong"}}, 1)]
    assert workers.work(SETUP, plan, [0], time.time() + 60, tmp_path / "lines") == workers.LOST
    assert json.loads((tmp_path / "lines").read_text().splitlines()[-1]) == {"index": 0, "lost": "wrong"}


def test_tasks_after_the_deadline_are_skipped(tmp_path: Path) -> None:
    plan = gpu_plan.tasks()
    assert workers.work(SETUP, plan, range(len(plan)), time.time() - 1, tmp_path / "lines") == 0
    first, *events = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert "machine" in first and len(events) == len(plan)
    assert all(event["row"] == {"skipped": "the time did not suffice"} for event in events)


def test_a_process_that_outlives_the_deadline_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.5)
    found: dict[int, dict] = {}
    plan = gpu_plan.tasks(["around"])
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = time.time()
    workers.supervise(command, plan, started, 1, found.__setitem__, lambda machine: None)
    assert time.time() - started < 30
    assert [found[i] for i in range(len(plan))] == [{"skipped": "the time was over"}] * len(plan)

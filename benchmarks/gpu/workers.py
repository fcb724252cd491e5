"""Worker processes for the plan: a task that crashes or hangs loses its own row, and no other.

A kernel that reads out of bounds leaves its process without a device, so the rest of the plan continues in a
new process. If the cuda backend took part, the new process leaves it out, and a row that was being timed is
measured again without it. Checks, which time nothing, run in several processes at once, so that their kernels
compile in parallel.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..timing.rows import Row
from .machine import describe
from .plan import Task
from .setup import Setup

LOST = 3  # exit code of a process whose device does not answer
GRACE = 20.0  # seconds beyond the deadline for the running task
DYING = 20.0  # seconds to wait for a killed process; one that hangs in its driver is left behind
NO_CUDA = "--no-cuda"  # option of the command
Report = Callable[[int, Row], None]  # index of the task, its row


def work(setup: Setup, plan: Sequence[Task], indices: Sequence[int], deadline: float, file: Path) -> int:
    """Run some tasks in this process.

    Args:
        setup: where to run.
        plan: all tasks.
        indices: of the tasks to run, in order.
        deadline: time.time() after which no task is started.
        file: takes a JSON line for the machine, for each task's start and for its row.

    Returns:
        Exit code: 0, or LOST.
    """
    with file.open("a") as lines:

        def write(**event: object) -> None:
            lines.write(json.dumps(event) + "\n")
            lines.flush()

        write(machine=describe(setup))
        for index in indices:
            task = plan[index]
            if time.time() + (0 if setup.dry else task.seconds) > deadline:
                write(index=index, row={"skipped": "the time did not suffice"})
                continue
            write(index=index, begun=True)
            start = time.time()
            try:
                row = task.run(setup)
                if setup.device.type == "cuda":
                    torch.cuda.synchronize(setup.device)
            except Exception as error:
                traceback.print_exc()
                first = str(error).strip().splitlines()
                row = {"failures": {task.title: f"{type(error).__name__}: {first[0] if first else ''}"}}
            if not _alive(setup.device):
                why: Any = row.get("failures", {})
                write(index=index, lost="; ".join(why.values()) or "the device no longer answers")
                return LOST
            write(index=index, row={**row, "took": round(time.time() - start, 2)})
    return 0


def _alive(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


class Worker:
    """A process that runs some tasks in order; if a task ends it, a new process continues with the next task.

    Args:
        command: of the process, without the worker's own options.
        plan: all tasks.
        indices: of the tasks to run.
        folder: for the files through which processes report.
    """

    def __init__(
        self, command: Sequence[str], plan: Sequence[Task], indices: Sequence[int], folder: Path
    ) -> None:
        self.command, self.plan, self.left, self.folder = list(command), plan, list(indices), folder
        self.again: dict[int, str] = {}  # tasks to repeat, and why
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self.current: int | None = None
        self.since, self.progressed = time.time(), False
        self.lost: str | None = None
        self.file = self.folder / f"{self.left[0]}-{self.starts}.jsonl"
        self.file.touch()
        self.read, self.part = self.file.open(), ""
        which = ",".join(map(str, self.left))
        self.process = subprocess.Popen([*self.command, "--worker", str(self.file), "--tasks", which])

    def poll(self, deadline: float, report: Report, machine: Callable[[Row], None]) -> bool:
        """Report what the process has written since; False when no task is left."""
        ended = self.process.poll()  # before reading: its last lines are then in the file
        self._drain(report, machine)
        if ended is None:
            self._watch(deadline, report)
            return True
        if not self.left:
            self.close()
            return False
        if self.current is not None:
            self._lose(self.current, self.lost or f"the process ended with exit code {ended}", report)
        elif not self.progressed or ended == 0:
            for index in list(self.left):
                self._fail(index, f"the process did not begin it and ended with exit code {ended}", report)
        self.close()
        if self.left:
            self._start()
        return bool(self.left)

    def _watch(self, deadline: float, report: Report) -> None:
        now = time.time()
        if now > deadline + GRACE:
            self._kill()
            self._drain(report, lambda _: None)
            for index in list(self.left):
                self._done(index, {"skipped": "the time was over"}, report)
        elif self.current is not None and now - self.since > self.plan[self.current].limit:
            self._kill()
            self._drain(report, lambda _: None)
            if self.current is not None:
                self._lose(self.current, f"no result after {self.plan[self.current].limit:.0f} s", report)

    def _drain(self, report: Report, machine: Callable[[Row], None]) -> None:
        *lines, self.part = (self.part + self.read.read()).split("\n")  # the last line may be incomplete
        for event in map(json.loads, lines):
            if "machine" in event:
                machine(event["machine"])
            elif "begun" in event:
                self.current, self.since = event["index"], time.time()
            elif "lost" in event:
                self.lost = event["lost"]
            else:
                self._done(event["index"], event["row"], report)

    def _done(self, index: int, row: Row, report: Report) -> None:
        self.left.remove(index)
        self.current, self.since, self.progressed = None, time.time(), True
        if (why := self.again.pop(index, None)) is not None:
            failures: Any = row.get("failures", {})
            row = {**row, "failures": {**failures, "cuda": why}}
        report(index, row)

    def _lose(self, index: int, why: str, report: Report) -> None:
        """Record a task that ended its process; repeat it without the cuda backend if that may be why."""
        task, suspect = self.plan[index], NO_CUDA not in self.command
        if task.cuda and suspect:
            self.command.append(NO_CUDA)
        if task.cuda and suspect and not task.apart:
            self.again[index] = why
            self.current, self.progressed = None, True
        else:
            self._fail(index, why, report)

    def _fail(self, index: int, why: str, report: Report) -> None:
        self._done(index, {"failures": {self.plan[index].title: why}}, report)

    def _kill(self) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(DYING)

    def close(self) -> None:
        """Kill the process if it still runs, and close its file."""
        if self.process.poll() is None:
            self._kill()
        self.read.close()


def supervise(
    command: Sequence[str],
    plan: Sequence[Task],
    deadline: float,
    jobs: int,
    report: Report,
    machine: Callable[[Row], None],
) -> None:
    """Run the whole plan: timed tasks one at a time and in order, checks in up to `jobs` processes.

    Args:
        command: that runs a worker, without the worker's own options.
        plan: the tasks.
        deadline: time.time() at which the run ends.
        jobs: processes that run checks side by side.
        report: takes the index of a task and its row.
        machine: takes the machine's description.
    """
    apart = [i for i, task in enumerate(plan) if task.apart] if jobs > 1 else []
    first = [i for i in range(len(plan)) if i not in apart and (not apart or i < apart[0])]
    rest = [i for i in range(len(plan)) if i not in apart and i not in first]
    shares = [apart[i::jobs] for i in range(jobs)]
    with tempfile.TemporaryDirectory(prefix="flashbrush-gpu-") as folder:
        for phase in ([first], shares, [rest]):
            workers = [Worker(command, plan, indices, Path(folder)) for indices in phase if indices]
            running = workers
            try:
                while running:
                    running = [w for w in running if w.poll(deadline, report, machine)]
                    time.sleep(0.05)
            finally:
                for worker in running:
                    worker.close()
            if any(NO_CUDA in worker.command for worker in workers):
                command = [*command, NO_CUDA]


def python_command(script: Path, arguments: Sequence[str], deadline: float) -> list[str]:
    """The command that runs a script with these arguments and this deadline."""
    return [sys.executable, str(script), *arguments, "--deadline", repr(deadline)]

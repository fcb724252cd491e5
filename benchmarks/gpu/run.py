"""The one command for a machine with a GPU: checks every kernel, and times it beside all that is installed.

    python benchmarks/gpu/run.py --out results          from a checkout; needs torch, triton and numpy alone
    python benchmarks/gpu/run.py --build --out results  compiles csrc/cuda first, with the machine's nvcc
    python benchmarks/gpu/run.py --dry-run              the whole plan on the CPU, with tiny shapes

Exit code 0; 1 where a result is wrong or a task failed, which are not timed; 2 for wrong arguments or no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .setup import Setup

ROOT = Path(__file__).resolve().parents[2]
MODULE = "flashbrush.benchmarks.gpu.run"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the plan, or as a worker some of its tasks.

    Args:
        argv: the command's arguments; None: the process's.

    Returns:
        The exit code.
    """
    from . import plots, report, workers
    from .plan import tasks

    started = time.time()
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        plan = tasks(options.sections)
        setup = _setup(options)
    except (ValueError, OSError) as error:
        print(f"run.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.worker is not None:
        indices = [int(i) for i in options.tasks.split(",")]
        return workers.work(setup, plan, indices, options.deadline, options.worker)
    deadline = started + 60 * options.minutes
    conditions = {
        "device": str(setup.device),
        "backend": setup.backend,
        "dry_run": setup.dry,
        "minutes": options.minutes,
        "sections": list(options.sections),
        "jobs": options.jobs,
        "timing": "device events, L2 flushed before each call, contestants in turns in random order, "
        "inputs rotate",
    }
    results = report.Results(plan, conditions, options.out)
    command = workers.python_command(Path(__file__), arguments, deadline)
    # SystemExit runs the `finally` in supervise, which ends the worker processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    workers.supervise(command, plan, deadline, options.jobs, results.add, results.set_machine)
    results.write()
    for line in report.summary(results):
        print(line)
    drawn = plots.write(results.ordered, results.machine, results.gemm, options.out)
    print(f"plots: left out: {drawn}" if isinstance(drawn, str) else f"plots: {', '.join(map(str, drawn))}")
    print(f"written: {results.paths['json']}, {results.paths['csv']}; {time.time() - results.start:.0f} s")
    return 1 if results.collect("failures") else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"run.py: {message}\n")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from .plan import SECTIONS

    parser = _Parser(
        prog="run.py", description="Our attention on this GPU, checked and timed beside others'."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder for what is written (gpu-results)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="time limit; tasks that do not fit are listed as skipped (8)",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, with tiny shapes; its times mean nothing"
    )
    parser.add_argument("--build", action="store_true", help="compile csrc/cuda first, for the cuda backend")
    parser.add_argument("--no-cuda", action="store_true", help="leave the cuda backend out")
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:1 ...")
    parser.add_argument(
        "--backend", help="of ours: see flashbrush info (triton; in a dry run cpu, or composed)"
    )
    parser.add_argument("--jobs", type=int, help="processes that check side by side (6; in a dry run 1)")
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="FILE",
        help="Python file whose contestants() returns more of them: "
        "{name: flashbrush.benchmarks.cases.contestants.Contestant}",
    )
    for name, kind in (("--worker", Path), ("--tasks", str), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.jobs = options.jobs or (1 if options.dry_run else max(1, min(6, (os.cpu_count() or 2) // 2)))
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    if not 0 < options.minutes < 1e4:
        parser.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got a file: {options.out}")
    return options


def _setup(options: argparse.Namespace) -> Setup:
    """The run's Setup.

    Raises:
        ValueError: no such GPU, backend or contestants.
    """
    import torch

    from ...bindings import backends
    from .setup import Setup

    device = torch.device("cpu" if options.dry_run else options.device)
    if options.build and options.worker is None and (failed := _build()):
        print(f"run.py: {failed}; the run continues without it", file=sys.stderr)
    known = backends()
    if not options.dry_run and (device.type != "cuda" or not torch.cuda.is_available()):
        raise ValueError(
            f"device: no GPU is visible to torch as {options.device!r}; --dry-run walks the plan on the CPU"
        )
    fallback = "composed" if known["cpu"] else "cpu"
    backend = options.backend or (fallback if options.dry_run else "triton")
    if backend not in known:
        raise ValueError(f"backend: expected one of {', '.join(known)}, got {backend!r}")
    if known[backend]:
        raise ValueError(f"backend: {backend!r} is not usable here: {'; '.join(known[backend])}")
    if device.type == "cuda":
        torch.cuda.set_device(device if device.index is not None else 0)
        device = torch.device("cuda", torch.cuda.current_device())
    return Setup(device, backend, options.dry_run, _more(options.peers), options.build, not options.no_cuda)


def _build() -> str | None:
    """Compile csrc/cuda into the checkout.

    Returns:
        None; or why it failed: no nvcc, nvcc's error, or setup.py cannot be imported.
    """
    from ..cases.contestants import Missing
    from .cuda_builds import load_builder

    try:
        builder = load_builder()
    except Missing as reason:
        return f"build: {reason}"
    before = os.getcwd()
    os.chdir(ROOT)  # setup.py's paths are relative
    try:
        report = builder["build_cuda_library"](builder["BACKENDS"])
    finally:
        os.chdir(before)
    if report["error"]:
        return f"build: {report['error']}\n{report['output']}"
    for kernel, resources in report["kernels"].items():
        print(f"{kernel}: {resources['registers']} registers, {resources['spills']} bytes spilled")
    return None


def _more(file: Path | None) -> dict:
    """The contestants of a --peers file."""
    from .contestants import VENDORS
    from .controls import OURS

    if file is None:
        return {}
    if not file.is_file():
        raise ValueError(f"peers: expected a Python file, got {file}")
    found: Any = runpy.run_path(str(file)).get("contestants")
    if not callable(found):
        raise ValueError(f"peers: {file} has no function contestants()")
    more: Any = found()
    if taken := {*VENDORS, *OURS, "composed", "eager"} & more.keys():
        raise ValueError(f"peers: these names are taken: {', '.join(sorted(taken))}")
    return more


def _run_as_module() -> None:
    """Import the checkout's root as the package flashbrush, whatever is installed, and run this file."""
    # Without this folder, whose files have the names of other modules.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks" / "gpu"]
    spec = importlib.util.spec_from_file_location(
        "flashbrush", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["flashbrush"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    runpy.run_module(MODULE, run_name="__main__")


if __name__ == "__main__":
    if not __package__:
        _run_as_module()
    else:
        sys.exit(main())

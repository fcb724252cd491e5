"""Two builds of the CPU library against each other: the same calls, in two processes that take turns.

    python -m flashbrush.benchmarks.cpu.libraries OLD.so [NEW.so] [--rounds 31] [--threads 1] [--isa avx2]

NEW.so is the installed library by default. Prints for each call the median of new / old over the rounds, with
its quartiles: below 1, the new one is faster.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ...bindings import Contrast, Control, Segments, attention, column_mass
from ...bindings.backends.cpu import library as cpu
from ..timing.host_clock import time_on_host
from ..timing.rounds import spread

SHORTEST = 0.05  # seconds of a sample


def calls() -> dict[str, Callable[[], object]]:
    """Short and long rows in float32 and bfloat16, and each of the sums that the kernels take."""
    found: dict[str, Callable[[], object]] = {}

    def add(name: str, rows: int, keys: int, heads: int, dim: int, dtype: torch.dtype, contrast=None) -> None:
        q, k, v = (torch.randn(1, n, heads, dim).to(dtype) for n in (rows, keys, keys))
        control = Control(Segments(r=rows), Segments(k=keys), contrast=contrast) if contrast else None
        found[name] = lambda: attention(q, k, v, control, backend="cpu")

    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        for tokens, heads in ((16, 8), (256, 8), (1024, 4), (4096, 2)):
            for dim in (64, 128):
                add(f"{short}, {tokens} tokens, D {dim}", tokens, tokens, heads, dim, dtype)
        for rows in (1, 8, 33):
            add(f"{short}, {rows} rows, 4096 keys", rows, 4096, 8, 64, dtype)
    add("float32, unclipped contrast, 1024 tokens", 1024, 1024, 4, 64, torch.float32, Contrast(1.67, None))
    q = torch.randn(1, 1024, 4, 64)
    lse = attention(q, q, q, backend="reference", return_stats=True)[1].lse
    found["float32, column_mass, 1024 tokens"] = lambda: column_mass(q, q, lse)
    return found


def work(library: Path, threads: int) -> None:
    """Time the call that each line of standard input names, and print its seconds."""
    cpu.LIBRARY = library
    if reasons := cpu.available():
        raise SystemExit("; ".join(reasons))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    chosen = calls()
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        print(time_on_host({name: chosen[name]}, 1, SHORTEST)[name][0], flush=True)


class Worker:
    """A process that has loaded one library."""

    def __init__(self, library: Path, threads: int) -> None:
        command = [sys.executable, "-m", __spec__.name, str(library), "--threads", str(threads), "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.answer() != "ready":
            raise SystemExit(f"{library}: cannot be loaded")

    def answer(self) -> str:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def time(self, name: str) -> float:
        """Seconds per call of the call of this name."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self.answer())

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=cpu.LIBRARY)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", help="instruction set, by default the best of this machine")
    parser.add_argument("--only", default="", help="calls whose name has this in it")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(given.old.resolve(), given.threads)
    if given.isa:
        os.environ["FLASHBRUSH_CPU_ISA"] = given.isa
    old, new = Worker(given.old.resolve(), given.threads), Worker(given.new.resolve(), given.threads)
    print("new / old: median [quartiles]")
    for name in (n for n in calls() if given.only in n):
        ratios = []
        for n in range(given.rounds):
            pair = (old, new) if n % 2 else (new, old)
            seconds = {worker: worker.time(name) for worker in pair}
            ratios.append(seconds[new] / seconds[old])
        found = spread(ratios)
        print(f"{name:45} {found.median:.3f} [{found.q1:.3f}, {found.q3:.3f}]", flush=True)
    old.stop()
    new.stop()


if __name__ == "__main__":
    main()

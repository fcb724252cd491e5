"""Short attention calls of two checkouts, timed in two processes that take turns.

    python benchmarks/cpu/checkouts.py OLD NEW [--triton] [--rounds 41] [--output FILE]

OLD and NEW are folders with a built clone each. One thread, 8 heads of 64, float32, 16 and 256 tokens, plain
and with a control, where the launcher and its checks take a large part of the time.

With --triton, what the host does for a launch of the Triton backend: from the problem to the compiled kernel
that Triton finds for the arguments, without the driver. No GPU is needed; kernels are compiled for sm_90.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WORKER = """
import sys, time, torch, flashbrush as fb
torch.set_num_threads(1)
calls = {}
for tokens in (16, 256):
    q, k, v = torch.randn(3, 1, tokens, 8, 64)
    a, b = tokens // 4, 3 * tokens // 8
    control = fb.Control(
        fb.Segments(prompt=a, subject=b, target=b),
        weight={("target", "prompt"): 1.3},
        head_gain=fb.HeadGain(),
    )
    calls[f"{tokens} tokens, plain"] = lambda q=q, k=k, v=v: fb.attention(q, k, v)
    calls[f"{tokens} tokens, controlled"] = lambda q=q, k=k, v=v, c=control: fb.attention(q, k, v, c)
assert not fb.backends()["cpu"], fb.backends()["cpu"]
"""

TRITON_WORKER = """
import functools, sys, time, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
import flashbrush as fb
from flashbrush.bindings.backends.triton import attention, backward
from flashbrush.bindings.core.lowering import lower

class Device:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Device())
attention.arch = backward.arch = lambda device: 90
run = JITFunction.run
JITFunction.run = lambda self, *args, **options: run(self, *args, **{**options, "warmup": True})
torch.set_num_threads(1)
q, k, v = torch.randn(3, 1, 256, 8, 64, dtype=torch.float16)
segments = fb.Segments(prompt=64, subject=96, target=96)
weight = {("target", "prompt"): 1.3}
problems = {
    "plain": lower(q, k, v, None),
    "controlled": lower(q, k, v, fb.Control(segments, weight=weight)),
    "head gain": lower(q, k, v, fb.Control(segments, weight=weight, head_gain=fb.HeadGain())),
}
calls = {name: functools.partial(attention.forward, p) for name, p in problems.items()}
lse, gain = torch.zeros(1, 8, 256, 1), torch.ones(1, 8, 3)
calls["gradient"] = lambda: backward.backward(problems["controlled"], q, q, lse, gain)
"""

SERVE = """
for call in calls.values():
    for _ in range(300):
        call()
print(*calls, sep="|", flush=True)
for line in sys.stdin:
    name = line.strip()
    count = 300 if name.startswith("256 ") else 2000
    start = time.perf_counter()
    for _ in range(count):
        calls[name]()
    print((time.perf_counter() - start) / count * 1e6, flush=True)
"""


def start(checkout: Path, folder: Path, calls: str) -> subprocess.Popen:
    """A process that times a call by name whenever it reads one; `calls` is code that makes the calls."""
    link = folder / "flashbrush"
    folder.mkdir()
    link.symlink_to(checkout.resolve())
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", calls + SERVE],
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def ask(worker: subprocess.Popen, name: str) -> float:
    """Microseconds per call."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def median_interval(sample: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median, by order statistics (normal approximation of the binomial)."""
    ordered, n = sorted(sample), len(sample)
    reach = 0.98 * n**0.5
    return ordered[max(0, int(n / 2 - reach))], ordered[min(n - 1, int(n / 2 + reach))]


def conditions(old: Path, new: Path, folder: Path) -> dict[str, object]:
    """Both commits, and the machine as the new checkout in `folder` describes it, with the threads used."""
    code = "import json; from flashbrush.integrations.evaluation import machine as m"
    code += "; print(json.dumps(m.describe()))"
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    described = subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=folder, text=True)
    revisions = [
        subprocess.check_output(["git", "-C", path, "log", "-1", "--format=%h %s"], text=True).strip()
        for path in (old, new)
    ]
    return {"old": revisions[0], "new": revisions[1], "machine": json.loads(described)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--triton", action="store_true")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        workers = [
            start(checkout, Path(scratch, name), TRITON_WORKER if options.triton else WORKER)
            for name, checkout in vars(options).items()
            if name in ("old", "new")
        ]
        names, _ = (worker.stdout.readline().strip().split("|") for worker in workers)  # type: ignore[union-attr]
        for name in names:
            times: list[list[float]] = [[], []]
            for round_ in range(options.rounds):
                for i in (0, 1) if round_ % 2 else (1, 0):
                    times[i].append(ask(workers[i], name))
            ratios = [new / old for old, new in zip(*times, strict=True)]
            low, high = median_interval(ratios)
            old, new, ratio = (statistics.median(sample) for sample in (*times, ratios))
            results[name] = {"old us": old, "new us": new, "new / old": ratio, "interval": [low, high]}
            print(f"{name:24} {old:7.1f} -> {new:7.1f} us, new / old {ratio:.3f} ({low:.3f} to {high:.3f})")
        for worker in workers:
            worker.kill()
        if options.output is not None:
            about = conditions(options.old, options.new, Path(scratch, "new"))
            found = {"rounds": options.rounds, **about, "calls": results}
            options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

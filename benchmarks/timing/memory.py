"""Peak memory of one call on the CPU: the high-water mark of a fresh process's resident memory.

Our C++ kernel and oneDNN allocate outside torch, where no hook on torch's allocator sees them. So a child
process draws the inputs, warms up on a small shape, resets the high-water mark (/proc/self/clear_refs), makes
one call and reads VmHWM. The call is the first at its shape, so a workspace that is kept for later calls
counts. glibc is set to return freed memory at once; otherwise memory freed after the warm-up could be reused
without raising the mark.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import torch

from ..cases.contestants import CONTESTANTS, OPTIONAL, Missing
from ..cases.inputs import draw_case
from ..cases.shapes import EVERY

RETURN_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one call.

    Attributes:
        peak: above the process's memory before the call, the output included.
        output: of the result.
    """

    peak: int
    output: int

    @property
    def extra(self) -> int:
        return max(self.peak - self.output, 0)


def measurable() -> bool:
    """Whether the system reports a process's high-water mark and lets it be reset."""
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def peak(contestant: str, shape: str, dtype: torch.dtype, threads: int) -> Memory | None:
    """Memory of one call of a contestant at a named shape; None where it cannot run or be measured.

    Raises:
        RuntimeError: the child process failed.
    """
    if not measurable():
        return None
    paths = [p for p in (*sys.path, os.environ.get("PYTHONPATH", "")) if p]
    done = subprocess.run(
        [sys.executable, "-m", __name__, contestant, shape, str(dtype).removeprefix("torch."), str(threads)],
        env={**os.environ, **RETURN_FREED_MEMORY, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(
            f"memory of {contestant} at {shape}: the child process failed:\n{done.stderr[-2000:]}"
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    return None if "missing" in answer else Memory(**answer)


@torch.no_grad()
def _measure_here(name: str, shape_name: str, dtype_name: str, threads: str) -> dict[str, object]:
    """Memory's fields, or the reason why the contestant is missing."""
    torch.set_num_threads(int(threads))
    contestant = {**CONTESTANTS, **OPTIONAL}[name]
    shape, dtype = EVERY[shape_name], getattr(torch, dtype_name)
    try:
        contestant.start(draw_case(shape.shrunk(), dtype))
        call, _ = contestant.prepare(draw_case(shape, dtype))
    except Missing as reason:
        return {"missing": str(reason)}
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = _status("VmRSS")
    out = call()
    return {"peak": _status("VmHWM") - before, "output": out.numel() * out.element_size()}


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(_measure_here(*sys.argv[1:])))

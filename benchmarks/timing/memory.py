"""Peak memory of one call on the CPU: the high-water mark of a fresh process's resident memory.

Our C++ kernel and oneDNN allocate outside torch, so that no hook on torch's allocator would see them. A child
process draws the inputs, warms up on a small shape, resets the high-water mark (/proc/self/clear_refs), makes
the call once and reads VmHWM. It is the call's first at this shape, so that a workspace that is kept for the
next one counts. glibc is told to return freed memory at once, or the warm-up's could serve unseen.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import torch

from ..cases.shapes import EVERY
from ..cpu import peers

TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Memory:
    peak: int  # bytes above the process before the call; the output is one part of them
    output: int

    @property
    def extra(self) -> int:
        return max(self.peak - self.output, 0)


def measurable() -> bool:
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def peak(peer: str, shape: str, dtype: torch.dtype, threads: int) -> Memory | None:
    """Of one call of a contestant at a named shape; None where it cannot run, or the system does not tell."""
    if not measurable():
        return None
    paths = [p for p in (*sys.path, os.environ.get("PYTHONPATH", "")) if p]
    done = subprocess.run(
        [sys.executable, "-m", __name__, peer, shape, str(dtype).removeprefix("torch."), str(threads)],
        env={**os.environ, **TRIMMED, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"memory of {peer} at {shape}: the child process failed:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return None if "missing" in answer else Memory(**answer)


@torch.no_grad()
def _child(peer_name: str, shape_name: str, dtype_name: str, threads: str) -> dict[str, object]:
    torch.set_num_threads(int(threads))
    peer = {**peers.PEERS, **peers.OPTIONAL}[peer_name]
    shape, dtype = EVERY[shape_name], getattr(torch, dtype_name)
    try:
        peer.start(peers.draw(shape.shrunk(), dtype))
        call, _ = peer.prepare(peers.draw(shape, dtype))
    except peers.Missing as reason:
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
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:])))

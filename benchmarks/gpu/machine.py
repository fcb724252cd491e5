"""The conditions of a GPU measurement: device, driver, versions, clocks as found, and the ceilings reached."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ...integrations.evaluation import machine
from ..cases.truth import WrongResult
from ..cpu.forward import Row
from ..cpu.peers import Missing, Peer
from ..timing import paired as timing
from .timing import interleaved, l2_bytes

QUERY = (
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
NO_CUDA = "left out: --no-cuda was given, or a process did not survive the cuda backend"


@dataclass(frozen=True)
class Setup:
    """Where everything runs, and by which of our backends."""

    device: torch.device
    backend: str
    dry: bool = False
    more: dict[str, Peer] = field(default_factory=dict)  # contestants of the caller's own
    build: bool = False  # whether CUDA sources may be compiled
    cuda: bool = True  # whether our cuda backend takes part

    def seconds(self, seconds: float) -> float:
        """How long a task may time; a dry run makes the fewest rounds."""
        return 0.0 if self.dry else seconds


@contextlib.contextmanager
def judged(
    label: str, missing: dict[str, str], failures: dict[str, str], device: torch.device, ours: bool = True
) -> Iterator[None]:
    """What becomes of a contestant: who cannot run here is missing, who is wrong has failed, and the others
    go on.

    Another error counts as a failure of ours, and as a reason why a peer is missing. It is raised again where
    the device no longer answers.
    """
    try:
        yield
    except Missing as reason:
        missing[label] = str(reason)
    except WrongResult as wrong:
        failures[label] = str(wrong)
    except torch.cuda.OutOfMemoryError:
        missing[label] = "the device's memory is not enough"
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        refused = isinstance(error, ValueError) and str(error).startswith("backend:")
        why = str(error) if refused else f"{type(error).__name__}: {lines[0] if lines else ''}"
        (missing if refused or not ours else failures)[label] = why
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def describe(setup: Setup) -> Row:
    about = machine.describe()
    kept = ("cpu", "cpus", "memory_gb", "system", "python", "torch", "triton", "flashbrush", "commit", "date")
    found: Row = {name: about[name] for name in kept}
    found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if setup.device.type != "cuda":
        return {"gpu": None, **found}
    p = torch.cuda.get_device_properties(setup.device)
    found |= {
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "gpu_memory_gb": round(p.total_memory / 1e9, 1),
        "l2_mb": round(l2_bytes(setup.device) / 1e6, 1),
        "cudnn": torch.backends.cudnn.version(),
    }
    return {"gpu": p.name, **found, "nvidia_smi": clocks(setup.device)}


def clocks(device: torch.device) -> Row:
    """What nvidia-smi says of the device now; empty without it, or where it knows the device by another name."""
    if device.type != "cuda":
        return {}
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    if uuid:
        command += ["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
    return dict(zip(QUERY, values, strict=False))


def ceilings(setup: Setup) -> Row:
    """Copy bandwidth (bytes read plus bytes written) and the rate of a bf16 matrix product, on random data."""
    device, dry = setup.device, setup.dry
    count, side = (1 << 16, 128) if dry else (1 << 30, 8192)
    source = torch.randn(count, device=device).bfloat16()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    calls = {
        "copy": [functools.partial(target.copy_, source)],
        "gemm": [functools.partial(torch.mm, a, b, out=product)],
    }
    samples = interleaved(calls, device, setup.seconds(1.0))
    expected = a[:8].double() @ b.double()
    if (
        not torch.equal(target, source)
        or not float((product[:8].double() - expected).norm() / expected.norm()) < 1e-2
    ):
        raise RuntimeError("the copy or the matrix product is wrong")
    spreads = {name: timing.spread(s) for name, s in samples.items()}
    return {
        "section": "ceilings",
        "seconds": {name: {**s.as_dict(), "samples": samples[name]} for name, s in spreads.items()},
        "copy_tb_per_s": round(2 * source.numel() * 2 / spreads["copy"].median / 1e12, 3),
        "gemm_side": side,
        "gemm_tflops": round(2 * side**3 / spreads["gemm"].median / 1e12, 1),
        "nvidia_smi_after": clocks(device),
    }


def slug(name: str | None) -> str:
    """A device's name as part of a file's: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", (name or "cpu").lower()).strip("-")

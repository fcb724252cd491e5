"""The conditions of a GPU measurement: device, driver, versions, and the clocks as found."""

from __future__ import annotations

import re
import subprocess

import torch

from ...integrations.evaluation import machine
from ..timing.device_clock import l2_bytes
from ..timing.rows import Row
from .setup import Setup

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


def describe(setup: Setup) -> Row:
    """The machine and its GPU, as a row's `machine`."""
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
    """What nvidia-smi reports of the device now; empty without nvidia-smi, or for an unknown device."""
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


def slug(name: str | None) -> str:
    """A device's name as part of a file name: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", (name or "cpu").lower()).strip("-")

"""flashbrush info: usable backends, installed versions and devices."""

from __future__ import annotations

import platform

import torch

from .shared.output import print_table

# Packages that `info` lists, and what needs each.
PACKAGES = {
    "flashbrush": "",
    "torch": "all",
    "triton": "the triton backend",
    "diffusers": "apply(), insert, edit, inspect, vicl, demo",
    "transformers": "insert, vicl, demo",
    "accelerate": "--offload, quick loading",
    "safetensors": "insert, vicl, demo",
    "numpy": "insert, vicl, demo",
    "Pillow": "insert, vicl, demo",
    "matplotlib": "insert --report, inspect, eval insert, sweep, demo",
    "scikit-image": "the photos of demo, eval insert and sweep",
    "torchmetrics": "eval",
}


def info() -> None:
    """What is usable here, and why the rest is not: backends, versions, devices."""
    from importlib.metadata import PackageNotFoundError, version

    from ...bindings import backends
    from ...bindings.backends.cpu import library as cpu

    usable = [(name, "no" if reasons else "yes", "\n".join(reasons)) for name, reasons in backends().items()]
    print_table(("backend", "usable", "why not"), usable, "Backends")
    versions = [("Python", platform.python_version(), "")]
    for name, use in PACKAGES.items():
        try:
            versions.append((name, version(name), use))
        except PackageNotFoundError:
            versions.append((name, "not installed", use))
    print_table(("package", "version", "for"), versions, "Versions")
    unproven = " (not yet run on hardware: only with FLASHBRUSH_CPU_ISA={0})"
    names = [isa + unproven.format(isa) * (isa in cpu.BY_NAME_ONLY) for isa in cpu.isas()]
    sets = f"; built and usable: {', '.join(names)}" if names else ""
    devices = [("cpu", f"{torch.get_num_threads()} threads; {torch.backends.cpu.get_cpu_capability()}{sets}")]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"))
    if not torch.cuda.device_count():
        built = torch.version.cuda or torch.version.hip
        devices.append(
            ("cuda", "none: " + ("torch sees no GPU" if built else "torch was built without CUDA"))
        )
    print_table(("device", "what"), devices, "Devices")

"""A call of FLUX under a method needs no more memory than a plain call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory"
)
def test_process_needs_no_memory_for_a_map() -> None:
    """At 4,096 image tokens, where the map of one head is 64 MiB.

    Beyond the largest tensors that other tests look at, the process's peak has the buffers inside of the
    operator.
    """
    # glibc returns at once what is freed.
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    # Not from the root, whose `integrations` is the package's.
    path = os.pathsep.join(p for p in sys.path if p and not Path(p, "integrations", "__init__.py").exists())
    command = [sys.executable, "-m", "integrations.methods.peak_memory_flux"]
    env = os.environ | limits | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    the_map = 4 * 4096 * 4096
    assert peaks.pop("eager") - peaks["plain"] > the_map  # the measurement would see a map
    plain, pair = peaks.pop("plain"), peaks.pop("plain pair")
    for name, taken in peaks.items():
        assert taken - (pair if name == "personalize" else plain) <= 0.05 * the_map, (name, peaks)

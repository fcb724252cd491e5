"""Reports of compiled kernels, from a process that compiles where this one may interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def compile_elsewhere(target: str, cases: Sequence[tuple]) -> list[dict]:
    """What compile_kernels says of the cases: operator, variant, head dim, dtype."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "support.compile_kernels", target],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)

"""One seed, hypothesis without deadlines (the machines that run this are slow and noisy), and Triton's interpreter.

Triton decides at its import whether kernels are interpreted, and any library may import it first: so it is chosen here.
The tests of the kernels run in it where there is no GPU; all others see the machine as it is.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
settings.register_profile(
    "flashbrush", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("flashbrush")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninterpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.parent.name != "kernels":
        monkeypatch.setenv("TRITON_INTERPRET", "0")

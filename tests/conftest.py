"""One seed, and hypothesis without deadlines: the machines that run this are slow and noisy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "flashbrush", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("flashbrush")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)

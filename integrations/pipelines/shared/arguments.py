"""Checks of arguments that several pipelines take."""

from __future__ import annotations

import math
from typing import Any

import torch


def check_number(name: str, value: Any, error: type[Exception] = ValueError) -> None:
    """ValueError unless it is a finite number; `error` where it is no number at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise error(f"{name}: expected a finite number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def noise_seed(seed: int | None, generator: torch.Generator | None) -> tuple[int, int | None]:
    """(what the noise is drawn from, the seed to report, None where a generator was given).

    Raises:
        ValueError: both, or a seed that is none. TypeError: a generator that is none.
    """
    if generator is not None:
        if seed is not None:
            raise ValueError("seed: expected it or generator, got both")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device)), None
    if seed is None:  # so that torch.manual_seed decides
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed!r}")
    return seed, seed


def check_texts(**texts: Any) -> None:
    """TypeError unless each is a string."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected a string, got {type(text).__name__}")


def check_steps(steps: Any) -> None:
    """ValueError unless it is a number of steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer of at least 1, got {steps!r}")

"""Checks of arguments that several pipelines share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_number(name: str, value: Any, error: type[Exception] = ValueError) -> None:
    """Check that an argument is a finite number.

    Args:
        name: of the argument, for the message.
        value: of the argument.
        error: raised where it is not a number.

    Raises:
        ValueError: NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise error(f"{name}: expected a finite number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def noise_seed(seed: int | None, generator: torch.Generator | None) -> tuple[int, int | None]:
    """The seed of the noise, from `seed`, from `generator`, or drawn from torch's default generator.

    Returns:
        (seed of the noise, seed to report; None where a generator was given).

    Raises:
        ValueError: both are given, or a seed is not an integer from 0 to 2**63 - 1.
        TypeError: not a torch.Generator.
    """
    if generator is not None:
        if seed is not None:
            raise ValueError("seed: expected it or generator, got both")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device)), None
    if seed is None:  # torch.manual_seed then makes the call reproducible
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed!r}")
    return seed, seed


def check_texts(**texts: Any) -> None:
    """Raise TypeError unless each argument is a string."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected a string, got {type(text).__name__}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless an argument is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def check_finite(latents: Tensor, dtype: torch.dtype) -> None:
    """Raise FloatingPointError unless all latents are finite; `dtype` is the model's, for the message."""
    if not bool(latents.isfinite().all()):
        raise FloatingPointError(f"the latents are no longer finite in {dtype}: try bfloat16 or float32")

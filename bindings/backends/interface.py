"""What a backend is: a package (or module) with these names.

name            what `backend=` takes
available()     the reasons, in words, why it cannot run on this machine; empty: it can
OPERATORS       {operator: Operator}, those that it implements
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Operator(NamedTuple):
    """One operator on one backend. Both functions take the same call; see operators/ for each one's
    arguments.
    """

    run: Callable[..., Any]
    why_not: Callable[..., list[str]]  # the reasons, in words, why this call cannot run; empty: it can


class Result(NamedTuple):
    """What attention gives; lse, mass and gain may be None where the problem does not need them."""

    out: Tensor  # (B, M, H, D), dtype of q
    lse: Tensor | None  # (B, H, M, G) float32, natural log
    mass: Tensor | None  # (B, H, R, C) float32
    gain: Tensor | None  # (B, H, R) float32


def never(*_: object) -> list[str]:
    """The why_not of an operator that takes every call."""
    return []

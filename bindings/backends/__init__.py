"""The backends: one file each, with the same functions.

name                the word that backend=... takes
available()         -> reasons in words why it cannot run on this machine at all; empty: it can
why_not(problem)    -> reasons in words why it cannot solve this problem; empty: it can
forward(problem)    -> Result
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Result(NamedTuple):
    """What every backend returns; lse, mass and gain may be None where the problem does not need them."""

    out: Tensor  # (B, M, H, D), dtype of q
    lse: Tensor | None  # (B, H, M, G) float32, natural log
    mass: Tensor | None  # (B, H, R, C) float32
    gain: Tensor | None  # (B, H, R) float32

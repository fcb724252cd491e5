"""Fused attention on the CPU, through the shared library built from csrc/cpu."""

from __future__ import annotations

from ..problem import Problem
from . import Result

name = "cpu"


def available() -> list[str]:
    return ["the shared library is not built"]


def why_not(problem: Problem) -> list[str]:
    return ["the shared library is not built"]


def forward(problem: Problem) -> Result:
    raise RuntimeError("the shared library is not built")

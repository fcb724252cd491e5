"""Fused attention in Triton."""

from __future__ import annotations

from ..problem import Problem
from . import Result

name = "triton"


def available() -> list[str]:
    return ["the kernel is not there"]


def why_not(problem: Problem) -> list[str]:
    return ["the kernel is not there"]


def forward(problem: Problem) -> Result:
    raise RuntimeError("the kernel is not there")

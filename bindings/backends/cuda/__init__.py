"""The cuda backend: the Hopper kernel from csrc/cuda, called through its C interface. Only `backend="cuda"`
takes it.
"""

from __future__ import annotations

from ..interface import Operator
from . import attention
from .attention import available

__all__ = ["OPERATORS", "available", "name"]
name = "cuda"

OPERATORS = {"attention": Operator(attention.forward, attention.why_not)}

"""The cpu backend: fused C++ kernels from csrc/cpu, called through their C interface."""

from __future__ import annotations

from ..interface import Operator
from . import attention, backward, column_mass, qk_norm_rope
from .library import available

__all__ = ["OPERATORS", "available", "name"]
name = "cpu"

OPERATORS = {
    "attention": Operator(attention.forward, attention.why_not),
    "attention_backward": Operator(backward.backward, attention.why_not),
    "column_mass": Operator(column_mass.column_mass, attention.why_not),
    "qk_norm_rope": Operator(qk_norm_rope.forward, qk_norm_rope.why_not),
    "qk_norm_rope_backward": Operator(qk_norm_rope.backward, qk_norm_rope.why_not),
}

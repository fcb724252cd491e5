"""column_mass on the CPU: products in packed tiles, no map; csrc/cpu/schedule/column_mass.cpp."""

from __future__ import annotations

from ctypes import Structure, c_char_p, c_int64, c_void_p

import torch
from torch import Tensor

from ...core.problem import Problem
from .library import run
from .structures import Attention, describe_call


class _ColumnMass(Structure):
    _fields_ = (("call", Attention), ("counted", c_char_p), ("mass", c_void_p), ("N", c_int64))


def column_mass(p: Problem, lse: Tensor, counted: tuple[int, ...]) -> Tensor:
    """lse (B, H, M, G); counted: the row segments that count -> (B, H, keys) float32"""
    mass = torch.zeros(p.batch, p.heads, p.keys, dtype=torch.float32)
    keep: list = []
    call = _ColumnMass(
        call=describe_call(p, p.q, lse.to(torch.float32).contiguous(), keep),
        counted=bytes(r in counted for r in range(len(p.row_lengths))),
        mass=mass.data_ptr(),
        N=p.keys,
    )
    run("column_mass", call)
    return mass

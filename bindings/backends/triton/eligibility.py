"""What the light Triton operators share: whose tensors they take."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu.device import interpreted
from . import attention as triton


def usable(t: Tensor) -> bool:
    """Whether the kernels take such a tensor where it is; the interpreter is for the kernels' own tests."""
    if t.device.type != "cuda" or t.dtype not in triton.DTYPES:
        return False
    return not triton.available() and not interpreted()


def emulated(t: Tensor) -> bool:
    return t.dtype == torch.bfloat16 and interpreted()

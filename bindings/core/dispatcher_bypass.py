"""Whether a call may go past torch's dispatcher, which takes longer over our operators' arguments than a
short kernel runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nobody would see a difference: no compiler, tracer, mode, transform or profiler is at work that
    is to be shown an operator, and the tensors are torch's own, with memory that says what they hold."""
    if torch.compiler.is_compiling() or _watched():
        return False
    return not any(
        t is not None
        and (
            type(t) not in _PLAIN
            or t.is_meta
            or t.is_neg()
            or t._is_zerotensor()
            or torch._is_functional_tensor(t)
        )
        for t in tensors
    )


def written_out(t: Tensor) -> Tensor:
    """The tensor, or a copy with memory of a gradient of zeros that torch has not written out."""
    return t.clone() if not torch.compiler.is_compiling() and t._is_zerotensor() else t


# Private, but what torch's own autograd.Function and modes ask. A torch without one of them dispatches every
# call.
try:
    from torch._C import (
        _are_functorch_transforms_active,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch.autograd import _profiler_enabled
except ImportError:

    def _watched() -> bool:
        return True

else:

    def _watched() -> bool:
        return bool(
            _len_torch_dispatch_stack()
            or _len_torch_function_stack()
            or _are_functorch_transforms_active()
            or _get_tracing_state() is not None
            or _profiler_enabled()
            or getattr(profiler, "_is_profiler_enabled", True)  # in whatever thread
        )

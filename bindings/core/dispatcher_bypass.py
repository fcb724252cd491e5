"""Whether an operator may be called without torch's dispatcher.

Boxing the operators' two dozen arguments takes longer than a short kernel runs
(benchmarks/results/overheads.json).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def can_skip_dispatcher(*tensors: Tensor | None) -> bool:
    """True in plain eager inference: no compiler, tracer, mode, functorch transform or profiler is active.

    The tensors must be torch's own classes, with memory that holds their values.
    """
    if torch.compiler.is_compiling() or _observed():
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


def with_memory(t: Tensor) -> Tensor:
    """The tensor, or a copy of a ZeroTensor: torch's gradient of zeros that has no memory."""
    return t.clone() if not torch.compiler.is_compiling() and t._is_zerotensor() else t


# Private names of torch, which its own autograd.Function and modes use. Where one is missing every call is
# dispatched.
try:
    from torch._C import (
        _are_functorch_transforms_active,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch.autograd import _profiler_enabled
except ImportError:

    def _observed() -> bool:
        return True

else:

    def _observed() -> bool:
        return bool(
            _len_torch_dispatch_stack()
            or _len_torch_function_stack()
            or _are_functorch_transforms_active()
            or _get_tracing_state() is not None
            or _profiler_enabled()
            or getattr(profiler, "_is_profiler_enabled", True)  # of any thread
        )

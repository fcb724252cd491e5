"""Forward-mode derivatives: an operator of ours has no rule for them, and would count as a constant."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: object) -> bool:
    """Whether one of the tensors is differentiated in forward mode (torch.func.jvp, forward_ad.make_dual)."""
    if forward_ad._current_level < 0:
        return False
    floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    return any(forward_ad.unpack_dual(t).tangent is not None for t in floats)


def refuse_tangents(*tensors: object) -> None:
    """NotImplementedError where has_tangent()."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            "flashbrush: no forward-mode derivatives (torch.func.jvp, forward_ad); take reverse mode or finite differences"
        )

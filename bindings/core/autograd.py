"""Refusal of derivatives that our operators have no rule for. Unrefused, they would count as constants,
silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
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
            "flashbrush: no forward-mode derivatives (torch.func.jvp, forward_ad); take reverse mode or "
            "finite differences"
        )


def first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorates the backward of an autograd.Function: differentiating its results raises RuntimeError.

    torch's once_differentiable gives them no edge to the inputs, so that torch.autograd.grad silently drops
    them.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *given: Tensor) -> tuple:
        with torch.no_grad():
            grads = backward(ctx, *given)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return grads
        present = [g for g in grads if g is not None]
        through = [t for t in (*given, *ctx.saved_tensors) if t is not None and t.is_floating_point()]
        marked = iter(_FirstOrder.apply(len(present), *present, *through))  # type: ignore[arg-type]
        return tuple(None if g is None else next(marked) for g in grads)

    return guarded


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(
            "flashbrush: no gradient of a gradient; attention() has one on backend='reference'"
        )

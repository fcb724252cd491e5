"""attention_sum(): several attentions of different queries or maps, gated and added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import attention
from .core.control import Control, fits_float32
from .core.lowering import Keys, Source, check_out, lower


@dataclass(frozen=True)
class Branch:
    """One term of attention_sum().

    Args:
        q: as in attention().
        k: as in attention().
        v: as in attention().
        control: as in attention().
        gate: multiplies the output: a finite number, or a float tensor (batch, rows) that does not require
            grad.
        scale: as in attention().
        source: as in attention().

    Examples:
        >>> import torch, flashbrush as fb
        >>> q, k, v = torch.randn(3, 1, 12, 2, 8)
        >>> fb.Branch(q, k, v, gate=0.5).gate
        0.5
    """

    q: Tensor
    k: Keys
    v: Keys
    control: Control | None = None
    gate: float | Tensor = 1.0
    scale: float | Tensor | None = None
    source: Source | None = None


def attention_sum(branches: Sequence[Branch], out: Tensor | None = None) -> Tensor:
    """sum_b gate_b * attention(branch b), for branches with their own queries, scales or maps.

    Branches that share q and scale are cheaper as one call with softmax groups: Control(groups=...,
    gates=...).

    Args:
        branches: at least one; their outputs have one shape (batch, rows, heads, dim) and one dtype.
        out: where to write the sum; not with tensors that require grad.

    Returns:
        (batch, rows, heads, dim) in q's dtype; the branches are added in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the branch and the argument. Nothing has been computed or written.

    Examples:
        >>> import torch, flashbrush as fb
        >>> q, k, v = torch.randn(3, 1, 12, 2, 8)
        >>> fb.attention_sum([fb.Branch(q, k, v), fb.Branch(2 * q, k, v, gate=0.5)]).shape
        torch.Size([1, 12, 2, 8])
    """
    if not isinstance(branches, (list, tuple)) or not branches:
        raise TypeError("branches: expected a non-empty list of Branch")
    shape: tuple[int, ...] = ()
    first: Tensor | None = None  # q as autocast casts it
    for i, b in enumerate(branches):
        if not isinstance(b, Branch):
            raise TypeError(f"branches[{i}]: expected a Branch, got {type(b).__name__}")
        try:
            problem = lower(b.q, b.k, b.v, b.control, b.scale, b.source)
        except (TypeError, ValueError) as error:
            raise type(error)(f"branches[{i}]: {error}") from None
        mine, q = (problem.batch, *b.q.shape[1:]), problem.q
        shape, first = shape or mine, q if first is None else first
        if mine != shape or q.dtype != first.dtype or q.device != first.device:
            raise ValueError(
                f"branches[{i}]: expected an output {first.dtype} {shape} on {first.device} as branches[0], "
                f"got {q.dtype} {mine} on {q.device}"
            )
        _check_gate(f"branches[{i}].gate", b.gate, shape[:2], q.device)
    assert first is not None
    if out is not None:
        check_out(out, first, shape)
        tensors = [
            t for b in branches for x in (b.q, b.k, b.v) for t in ((x,) if isinstance(x, Tensor) else x)
        ]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise ValueError("out: not with tensors that require grad")
    total: Tensor | None = None
    for b in branches:
        part = attention(b.q, b.k, b.v, b.control, scale=b.scale, source=b.source)
        part = part.to(torch.float64 if part.dtype == torch.float64 else torch.float32)
        gate = b.gate.to(part.dtype)[..., None, None] if isinstance(b.gate, Tensor) else b.gate
        part = part * gate
        total = part if total is None else total + part
    assert total is not None
    return total.to(first.dtype) if out is None else out.copy_(total)


def _check_gate(argument: str, gate: float | Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(gate, Tensor):
        if not isinstance(gate, (int, float)) or isinstance(gate, bool):
            raise TypeError(
                f"{argument}: expected a number or a float tensor (batch, rows), got {type(gate).__name__}"
            )
        if not fits_float32(gate):
            raise ValueError(f"{argument}: expected a finite number, got {gate}")
        return
    if not gate.is_floating_point():
        raise TypeError(f"{argument}: expected a float tensor, got {gate.dtype}")
    if gate.requires_grad:
        raise TypeError(f"{argument}: a gate that requires grad is not differentiated; pass gate.detach()")
    if gate.dim() != 2 or gate.shape[0] not in (1, shape[0]) or gate.shape[1] != shape[1]:
        raise ValueError(f"{argument}: expected a number or shape {tuple(shape)}, got {tuple(gate.shape)}")
    if gate.device != device:
        raise ValueError(f"{argument}: expected q's device {device}, got {gate.device}")
    if (
        gate.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not bool(torch.isfinite(gate).all())
    ):
        raise ValueError(f"{argument}: expected finite values")

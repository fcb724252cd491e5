"""key_probabilities(): a few columns of the attention map, with the gradient of the whole softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .attention import Keys, Source
from .backends.composed.backward import blocks, compute_dtype, only, softmax_backward, to_keys, to_query
from .backends.reference import gather
from .column_mass import lower_with_lse
from .core.autograd import first_order, refuse_tangents
from .core.control import Control
from .core.problem import Problem


def key_probabilities(
    q: Tensor,
    k: Keys,
    lse: Tensor,
    keys: Sequence[int] | Tensor,
    control: Control | None = None,
    *,
    scale: float | Tensor | None = None,
    source: Source | None = None,
) -> Tensor:
    """p_ij of all rows and a few keys, for cross-attention maps of words and losses on them.

    p is the probability within the key's softmax group, before weight, gate, contrast and gain.
    Differentiable in q and
    k as the whole softmax is: lse counts as a function of q and all of k, although it comes in as a number,
        so that the
    gradient reaches the keys that were not asked for. The map is recomputed in blocks of rows and never kept.

    Args:
        q, k, control, scale, source: as in attention().
        lse: `Stats.lse` of that attention, (batch, heads, rows, groups), without grad.
        keys: positions of the keys wanted, ints or an int tensor (n,), in the order of k (of the joined
            list).

    Returns:
        (batch, heads, rows, n) float32 (float64 for float64); 0 at removed keys.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    p = lower_with_lse(q, k, lse, control, scale, source)
    refuse_tangents(p.q, *p.k, lse)
    wanted = _positions(keys, p.keys, q.device)
    return _KeyProbabilities.apply(p, lse, wanted, p.q, *p.k)  # type: ignore[return-value]


class _KeyProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p: Problem, lse: Tensor, wanted: Tensor, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.p = p
        ctx.save_for_backward(lse, wanted, p.scales, *tensors)
        q, k, _ = gather(p, compute_dtype(p))
        out = q.new_zeros(p.batch, p.heads, p.rows, wanted.shape[0])
        if out.numel():
            for block in blocks(p, q, k, lse, wanted):
                out[:, :, block.rows] += block.prob
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        lse, wanted, scales, *tensors = ctx.saved_tensors
        p = replace(ctx.p, q=tensors[0], k=tuple(tensors[1:]), scales=scales)
        q, k, _ = gather(p, compute_dtype(p))
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        if dout.numel():
            for block in blocks(p, q, k, lse):
                given = dout[:, :, block.rows].to(q.dtype)
                ds = softmax_backward(p, block, torch.zeros_like(block.prob).index_add(3, wanted, given))
                dq[:, :, block.rows] += only(block.mine, ds @ block.k)
                dk += only(block.allowed, ds.transpose(2, 3) @ q[:, :, block.rows])
        return None, None, None, to_query(p, dq), *to_keys(p, dk, p.k, p.source_k)


def _positions(keys: Sequence[int] | Tensor, total: int, device: torch.device) -> Tensor:
    if isinstance(keys, Tensor):
        if keys.dim() != 1 or keys.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"keys: expected an int32 or int64 tensor (n,), got {keys.dtype} {tuple(keys.shape)}"
            )
    elif not isinstance(keys, (list, tuple, range)) or any(
        isinstance(i, bool) or not isinstance(i, int) for i in keys
    ):
        raise TypeError(f"keys: expected a list of ints or an int tensor (n,), got {keys!r}")
    ends: tuple[int, int] | None = None
    if not isinstance(keys, Tensor):
        ends = (min(keys), max(keys)) if keys else None
        positions = torch.tensor(list(keys), dtype=torch.int64, device="cpu")
    else:
        positions = keys.long()
        if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
            ends = int(positions.min()), int(positions.max())
    if ends is not None and not 0 <= ends[0] <= ends[1] < total:
        raise ValueError(f"keys: expected positions in 0..{total - 1}, got {ends[0]}..{ends[1]}")
    return positions.to(device)

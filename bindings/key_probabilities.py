"""key_probabilities(): a few columns of the attention map, with the gradient of the whole softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .core.autograd import first_order, refuse_tangents
from .core.control import Control
from .core.lowering import Keys, Source, lower_with_lse
from .core.problem import Problem
from .core.recomputed_map import blocks, compute_dtype, only, softmax_backward, to_keys, to_query
from .core.semantics import gather


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
    """p_ij of all rows and a few keys: cross-attention maps of words, and losses on them.

    p is the probability within the key's softmax group, before weight, gate, contrast and gain. The map is
    recomputed in blocks of rows and never kept. Differentiable in q and k as the whole softmax is: lse counts
    as a function of q and of all of k, although it comes in as a number, so the gradient also reaches the
    keys that were not asked for.

    Args:
        q: as in attention().
        k: as in attention().
        lse: Stats.lse of that attention, (batch, heads, rows, groups), without grad.
        keys: the positions wanted, ints or an int tensor (n,), in the order of k, or of the joined list.
        control: as in attention().
        scale: as in attention().
        source: as in attention(), with the keys "q" and "k".

    Returns:
        (batch, heads, rows, n) float32 (float64 for float64); 0 at removed keys.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch, flashbrush as fb
        >>> q, k, v = torch.randn(3, 1, 12, 2, 8)
        >>> _, stats = fb.attention(q, k, v, return_stats=True)
        >>> fb.key_probabilities(q, k, stats.lse, [3, 5]).shape
        torch.Size([1, 2, 12, 2])
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
        p = ctx.p.changed(q=tensors[0], k=tuple(tensors[1:]), scales=scales)
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

"""merge(): attentions over disjoint sets of keys, joined into one softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attentions of the same queries over disjoint keys into the attention over all of them.

        lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p

    For rings, for chunked or cached keys, and for a row's own key as a term of its own. Differentiable in
    every out and lse.

    Args:
        parts: pairs (out, lse): out (batch, rows, heads, dim), all of one dtype; lse (batch, heads, rows), or
            (batch, heads, rows, 1) as `Stats.lse` of one softmax group, natural log. A part whose lse is -inf
            has no key in that row; its out is not read there.

    Returns:
        (out, lse): out in the parts' dtype; lse float32 (float64 if a part's is), in the shape that was
            given. A row without a key in any part gives 0 and -inf.

    Raises:
        TypeError, ValueError: naming the part, what was expected and what came.

    Examples:
        >>> import torch, flashbrush as fb
        >>> q, k, v = torch.randn(3, 1, 12, 2, 8)
        >>> halves = (slice(0, 5), slice(5, 12))
        >>> parts = [fb.attention(q, k[:, s], v[:, s], return_stats=True) for s in halves]
        >>> out, lse = fb.merge([(out, stats.lse) for out, stats in parts])
        >>> torch.allclose(out, fb.attention(q, k, v), atol=1e-5)
        True
    """
    if not isinstance(parts, Sequence) or not parts:
        raise TypeError("parts: expected a non-empty list of (out, lse) pairs")
    outs, lses = [], []
    for i, part in enumerate(parts):
        if (
            not isinstance(part, (tuple, list))
            or len(part) != 2
            or not all(isinstance(t, Tensor) for t in part)
        ):
            raise TypeError(f"parts[{i}]: expected a pair of tensors (out, lse)")
        out, lse = part
        _check(i, out, lse, parts[0])
        outs.append(out)
        lses.append(lse[..., 0] if lse.dim() == 4 else lse)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in lses) else torch.float32
    stacked = torch.stack([t.to(dtype) for t in lses])  # (parts, batch, heads, rows)
    dead = stacked == -torch.inf
    top = stacked.detach().amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    shares = torch.where(dead, 0, torch.exp(torch.where(dead, 0, stacked) - top))
    total, empty = shares.sum(0), dead.all(0)
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, -torch.inf, top + torch.log(total))
    merged = None
    for out, share, gone in zip(outs, shares / total, dead, strict=True):
        share, gone = (t.transpose(1, 2)[..., None] for t in (share, gone))  # (batch, rows, heads, 1)
        term = share * torch.where(gone, 0, out.to(dtype))
        merged = term if merged is None else merged + term
    assert merged is not None
    return merged.to(outs[0].dtype), lse.unsqueeze(-1) if parts[0][1].dim() == 4 else lse


def _check(i: int, out: Tensor, lse: Tensor, first: tuple[Tensor, Tensor]) -> None:
    if out.dim() != 4 or not out.is_floating_point():
        raise ValueError(
            f"parts[{i}]: expected out (batch, rows, heads, dim), got {out.dtype} {tuple(out.shape)}"
        )
    batch, rows, heads, _ = out.shape
    if not lse.is_floating_point() or tuple(lse.shape) not in ((batch, heads, rows), (batch, heads, rows, 1)):
        raise ValueError(
            f"parts[{i}]: expected lse ({batch}, {heads}, {rows}) or ({batch}, {heads}, {rows}, 1), "
            f"got {lse.dtype} {tuple(lse.shape)}"
        )
    for what, mine, theirs in (("out", out, first[0]), ("lse", lse, first[1])):
        if mine.shape != theirs.shape:
            raise ValueError(
                f"parts[{i}]: expected {what} {tuple(theirs.shape)} as in parts[0], got {tuple(mine.shape)}"
            )
        if mine.device != first[0].device:
            raise ValueError(
                f"parts[{i}]: expected {what} on {first[0].device} as in parts[0], got {mine.device}"
            )
    if out.dtype != first[0].dtype:
        raise TypeError(f"parts[{i}]: expected out's dtype {first[0].dtype} as in parts[0], got {out.dtype}")

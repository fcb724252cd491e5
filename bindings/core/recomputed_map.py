"""The attention map recomputed from the LSE, a block of rows at a time, and gradients through its softmax.

The gradient of composed attention, composed column_mass and key_probabilities share it. It never holds more
of the map than BLOCK_ELEMENTS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem
from .semantics import labels

BLOCK_ELEMENTS = 1 << 24  # of the recomputed map; bounds the extra memory to a few such float32 blocks


class Block(NamedTuple):
    """The map of some rows. N counts the columns that were asked for."""

    rows: slice
    label: Tensor  # (B, rows) segment of each row
    group: Tensor  # (B, H, rows, N) softmax group of each key
    seen: Tensor  # (B, H, rows, N) bool: the pair is not removed
    prob: Tensor  # (B, H, rows, N), 0 where removed
    weight: Tensor | None  # (B, 1|H, 1, N)
    mine: Tensor | None  # (B, 1, rows) bool: the row belongs to this block; None: all do
    allowed: Tensor | None  # (B, 1|H, N) bool: the block's rows see the key; None: they see all
    k: Tensor  # (B, H, N, D), 0 where not allowed


def blocks(p: Problem, q: Tensor, k: Tensor, lse: Tensor, keys: Tensor | None = None) -> Iterator[Block]:
    """The map, a block of rows at a time.

    A removed key is not read: its NaN must not meet a zero probability.

    Args:
        p: the problem.
        q: (B, H, M, D) of gather().
        k: (B, H, N, D) of gather().
        lse: (B, H, M, G).
        keys: (n,) positions; only these columns of the map. None: all.
    """
    B, H, M, dtype = p.batch, p.heads, p.rows, q.dtype
    a, _ = labels(p.row_lengths, p.row_items, B, M, q.device)
    c, rank = labels(p.key_lengths, p.key_items, B, p.keys, q.device)
    mask = None if p.mask is None else p.mask.expand(B, H, M, p.keys)
    if keys is not None:
        assert mask is None  # a row's own lse below needs all of its keys
        c, rank, k = c[:, keys], rank[:, keys], k[:, :, keys]
    exists = None if p.valid is None else (rank < p.valid.gather(1, c))[:, None]  # (B, 1, N)
    groups = torch.tensor(p.groups, device=q.device)[c][:, None, None]  # (B, 1, 1, N)
    scale = p.item_scale().to(dtype)
    step = max(1, min(M, BLOCK_ELEMENTS // max(1, B * H * k.shape[2])))
    for segments, tokens in _row_runs(p):
        bias, weight = (_key_row(table, segments[0], c, dtype) for table in (p.bias, p.weight))
        allowed = (
            exists if bias is None else bias != -math.inf if exists is None else exists & (bias != -math.inf)
        )
        k_run = only(allowed, k)
        for first in range(tokens.start, tokens.stop, step):
            rows = slice(first, min(tokens.stop, first + step))
            label = a[:, rows]
            s = torch.einsum("bhmd,bhnd->bhmn", q[:, :, rows], k_run) * scale
            seen = (
                torch.ones_like(s, dtype=torch.bool) if allowed is None else allowed[:, :, None].expand_as(s)
            )
            mine = (
                None
                if p.row_items is None
                else torch.isin(label, torch.tensor(segments, device=q.device))[:, None]
            )
            if mine is not None:
                seen = seen & mine[..., None]
            if bias is not None:
                s = s + bias[:, :, None]
            group, normal = groups.expand_as(s), lse[:, :, rows].to(dtype)
            if mask is not None and mask.dtype == torch.bool:
                seen = seen & mask[:, :, rows]
            elif mask is not None:
                m = mask[:, :, rows].to(dtype)
                seen = seen & (m != -math.inf)
                # Beside a mask of -1e9 over a whole row, the lse that came has lost the logits: relative to
                # the row's top.
                s = s + (m - _largest(seen, group, m, p.n_groups).gather(3, group))
                normal = _lse(seen, group, s, p.n_groups)
            prob = torch.where(seen, torch.exp(s - normal.gather(3, group)), 0)
            yield Block(
                rows,
                label,
                group,
                seen,
                prob,
                None if weight is None else weight[:, :, None],
                mine,
                allowed,
                k_run,
            )


def softmax_backward(p: Problem, b: Block, dprob: Tensor) -> Tensor:
    """dP (B, H, rows, N) -> scale * dS, with dS = p (dP - delta_g) and delta_g = sum over group g of p dP"""
    weighted = b.prob * torch.where(b.seen, dprob, 0)
    delta = torch.zeros_like(dprob[..., :1]).expand(-1, -1, -1, p.n_groups).scatter_add(3, b.group, weighted)
    return (weighted - b.prob * delta.gather(3, b.group)) * p.item_scale().to(dprob.dtype)


def _largest(seen: Tensor, group: Tensor, values: Tensor, n_groups: int) -> Tensor:
    """(B, H, rows, N) -> the largest seen value of each group (B, H, rows, groups), 0 if not finite"""
    empty = torch.full_like(values[..., :1], -math.inf).expand(-1, -1, -1, n_groups)
    top = empty.scatter_reduce(3, group, torch.where(seen, values, -math.inf), "amax")
    return torch.where(top.isfinite(), top, 0)


def _lse(seen: Tensor, group: Tensor, s: Tensor, n_groups: int) -> Tensor:
    """(B, H, rows, N) -> the logarithm of each group's sum of exp(s), (B, H, rows, groups)"""
    top = _largest(seen, group, s, n_groups)
    terms = torch.where(seen, torch.exp(s - top.gather(3, group)), 0)
    return top + torch.zeros_like(top).scatter_add(3, group, terms).log()


def compute_dtype(p: Problem) -> torch.dtype:
    return torch.float64 if p.q.dtype == torch.float64 else torch.float32


def _row_runs(p: Problem) -> list[tuple[list[int], slice]]:
    """(row segments, their tokens) of runs of neighbours to which the same entries apply.

    The tokens are all rows where segment lengths differ from item to item.
    """
    C, starts = len(p.key_lengths), (*p.row_starts(), p.rows)
    runs: list[list[int]] = []
    for r in range(len(p.row_lengths)):
        ids = p.pair_ids[r * C : (r + 1) * C]
        if runs and ids == p.pair_ids[runs[-1][0] * C : (runs[-1][0] + 1) * C]:
            runs[-1].append(r)
        else:
            runs.append([r])
    whole = p.row_items is not None
    return [(run, slice(0, p.rows) if whole else slice(starts[run[0]], starts[run[-1] + 1])) for run in runs]


def _key_row(table: Tensor | None, r: int, c: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Row r of a table (1|B, 1|H, R, C) at the keys' labels c (B, N) -> (B, 1|H, N)"""
    if table is None:
        return None
    row = table[:, :, r].to(dtype).expand(c.shape[0], -1, -1)
    return row.gather(2, c[:, None].expand(-1, row.shape[1], -1))


def only(allowed: Tensor | None, t: Tensor) -> Tensor:
    """t (B, H, tokens, D) with zeros at the tokens that allowed (B, 1|H, tokens) leaves out"""
    return t if allowed is None else torch.where(allowed[..., None], t, 0)


def to_query(p: Problem, dq: Tensor) -> Tensor:
    """dq (B, H, M, D) -> the gradient of the tensor that was read"""
    return _scatter(dq, (p.q,), None if p.source_q is None else p.source_q[None], p.heads)[0]


def to_keys(p: Problem, grad: Tensor, tensors: tuple[Tensor, ...], source: Tensor | None) -> list[Tensor]:
    """dk or dv (B, H, N, D) -> the gradients of the tensors that were read"""
    return _scatter(grad, tensors, source, p.kv_heads)


def _scatter(grad: Tensor, tensors: tuple[Tensor, ...], source: Tensor | None, heads: int) -> list[Tensor]:
    """The transpose of `gather`: (B, H, N, D) summed back onto the tensors that were read."""
    grad = grad.unflatten(1, (heads, -1)).sum(2).transpose(1, 2)  # (B, N, Hkv, D)
    grads, first = [], 0
    for i, t in enumerate(tensors):
        part = grad[:, first : first + t.shape[1]]
        first += t.shape[1]
        if source is not None:
            part = torch.zeros_like(t, dtype=grad.dtype).index_add_(0, source[i], part)
        elif t.shape[0] != part.shape[0]:
            part = part.sum(0, keepdim=True)
        # Copied: the gradients of two tensors of a list may not share memory.
        grads.append(part.to(t.dtype, copy=True, memory_format=torch.contiguous_format))
    return grads

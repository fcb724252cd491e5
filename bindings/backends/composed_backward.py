"""Gradient of the operator on every device: the map is recomputed from the LSE, a block of rows at a time.

    a_ij = gain * gate_g(i) * weight        dP_ij = a_ij <do_i, v_j>        delta_g(i) = sum_{j in g} p_ij dP_ij
    dS = p (dP - delta_g)                   dq = scale dS k     dk = scale dS^T q      dv = sum_i a_ij p_ij do_i

delta is taken per group: rowsum(do * o) of the total output is wrong as soon as there are two groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..problem import Problem
from .reference import gather, labels

BLOCK_ELEMENTS = 1 << 24  # of the recomputed map; bounds the extra memory to a few such float32 blocks


def backward(problem: Problem, dout: Tensor, lse: Tensor, gain: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dout (B, M, H, D), lse (B, H, M, G), gain (B, H, R) -> dq, and dk and dv, one for each of k and v."""
    p = problem
    B, M, H = p.batch, p.rows, p.heads
    if B * M * H == 0 or p.keys == 0:
        return torch.zeros_like(p.q), [torch.zeros_like(t) for t in p.k], [torch.zeros_like(t) for t in p.v]
    dtype = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    q, k, v = gather(p, dtype)
    do = dout.to(dtype).transpose(1, 2)
    a, _ = labels(p.row_lengths, p.row_items, B, M, q.device)
    c, rank = labels(p.key_lengths, p.key_items, B, p.keys, q.device)
    exists = None if p.valid is None else (rank < p.valid.gather(1, c))[:, None]  # (B, 1, N)
    groups = torch.tensor(p.groups, device=q.device)[c]  # (B, N)
    scale = p.item_scale().to(dtype)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    step = max(1, min(M, BLOCK_ELEMENTS // max(1, B * H * p.keys)))
    for segments, tokens in _row_runs(p):
        # Removed keys are not read and get no gradient: their NaN must not meet a zero probability.
        bias, weight = (_key_row(table, segments[0], c, dtype) for table in (p.bias, p.weight))
        allowed = exists if bias is None else bias != -math.inf if exists is None else exists & (bias != -math.inf)
        k_run, v_run = _only(allowed, k), _only(allowed, v if weight is None else _only(weight != 0, v))
        for first in range(tokens.start, tokens.stop, step):
            rows = slice(first, min(tokens.stop, first + step))
            label = a[:, rows]
            s = torch.einsum("bhmd,bhnd->bhmn", q[:, :, rows], k_run) * scale
            seen = torch.ones_like(s, dtype=torch.bool) if allowed is None else allowed[:, :, None].expand_as(s)
            mine = None if p.row_items is None else torch.isin(label, torch.tensor(segments, device=q.device))[:, None]
            if mine is not None:
                seen = seen & mine[..., None]
            if bias is not None:
                s = s + bias[:, :, None]
            if p.mask is not None:
                mask = p.mask.expand(B, H, M, p.keys)[:, :, rows]
                s, seen = (s, seen & mask) if mask.dtype == torch.bool else (s + mask.to(dtype), seen & (mask != -math.inf))
            index = groups[:, None, None, :].expand_as(s)
            prob = torch.where(seen, torch.exp(s - lse[:, :, rows].to(dtype).gather(3, index)), 0)
            factor = gain.to(dtype).gather(2, label[:, None, :].expand(B, H, -1))[..., None]  # (B, H, rows, 1)
            if weight is not None:
                factor = factor * weight[:, :, None]
            if p.gates is not None:
                gates = p.gates.to(dtype)[:, None].expand(B, H, M, p.n_groups)[:, :, rows]
                factor = factor * gates.gather(3, index)
            dprob = factor * torch.einsum("bhmd,bhnd->bhmn", do[:, :, rows], v_run)
            weighted = prob * torch.where(seen, dprob, 0)
            delta = torch.zeros_like(s[..., :1]).expand(-1, -1, -1, p.n_groups).scatter_add(3, index, weighted)
            ds = (weighted - prob * delta.gather(3, index)) * scale
            dq[:, :, rows] += _only(mine, ds @ k_run)
            dk += _only(allowed, ds.transpose(2, 3) @ q[:, :, rows])
            dv += _only(allowed, (factor * prob).transpose(2, 3) @ do[:, :, rows])
    return _scatter(dq, (p.q,), None if p.source_q is None else p.source_q[None], H)[0], *(
        _scatter(grad, tensors, source, p.kv_heads) for grad, tensors, source in ((dk, p.k, p.source_k), (dv, p.v, p.source_v))
    )  # type: ignore[return-value]


def _row_runs(p: Problem) -> list[tuple[list[int], slice]]:
    """(row segments, their tokens) of neighbours to which the same entries apply; all tokens where items differ."""
    C, starts = len(p.key_lengths), (*p.row_starts(), p.rows)
    runs: list[list[int]] = []
    for r in range(len(p.row_lengths)):
        kinds = p.kinds[r * C : (r + 1) * C]
        if runs and kinds == p.kinds[runs[-1][0] * C : (runs[-1][0] + 1) * C]:
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


def _only(allowed: Tensor | None, t: Tensor) -> Tensor:
    """t (B, H, tokens, D) with zeros at the tokens that allowed (B, 1|H, tokens) leaves out"""
    return t if allowed is None else torch.where(allowed[..., None], t, 0)


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

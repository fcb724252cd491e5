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
from .reference import expand_pairs, gather, labels

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
    exists = torch.ones_like(c, dtype=torch.bool) if p.valid is None else rank < p.valid.gather(1, c)
    groups = torch.tensor(p.groups, device=q.device)[c]  # (B, N)
    # A removed key is not read: its NaN must not meet a zero probability.
    k, v = (torch.where(exists[:, None, :, None], t, 0) for t in (k, v))
    scale = p.item_scale().to(dtype)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    step = max(1, min(M, BLOCK_ELEMENTS // max(1, B * H * p.keys)))
    for first in range(0, M, step):
        rows = slice(first, min(M, first + step))
        label = a[:, rows]
        allowed = exists[:, None, None, :]
        s = torch.einsum("bhmd,bhnd->bhmn", q[:, :, rows], k) * scale
        if p.bias is not None:
            bias = expand_pairs(p.bias, label, c, H).to(dtype)
            s, allowed = s + bias, allowed & (bias != -math.inf)
        if p.mask is not None:
            mask = p.mask.expand(B, H, M, p.keys)[:, :, rows]
            if mask.dtype == torch.bool:
                allowed = allowed & mask
            else:
                s, allowed = s + mask.to(dtype), allowed & (mask != -math.inf)
        index = groups[:, None, None, :].expand(B, H, label.shape[1], p.keys)
        prob = torch.where(allowed, torch.exp(s - lse[:, :, rows].to(dtype).gather(3, index)), 0)
        factor = gain.to(dtype).gather(2, label[:, None, :].expand(B, H, -1))[..., None]  # (B, H, rows, 1)
        if p.weight is not None:
            factor = factor * expand_pairs(p.weight, label, c, H).to(dtype)
        if p.gates is not None:
            gates = p.gates.to(dtype)[:, None].expand(B, H, M, p.n_groups)[:, :, rows]
            factor = factor * gates.gather(3, index)
        dprob = factor * torch.einsum("bhmd,bhnd->bhmn", do[:, :, rows], v)
        weighted = prob * torch.where(allowed, dprob, 0)
        delta = torch.zeros_like(s[..., :1]).expand(-1, -1, -1, p.n_groups).scatter_add(3, index, weighted)
        ds = (weighted - prob * delta.gather(3, index)) * scale
        dq[:, :, rows] = ds @ k
        dk += ds.transpose(2, 3) @ q[:, :, rows]
        dv += (factor * prob).transpose(2, 3) @ do[:, :, rows]
    return _scatter(dq, (p.q,), None if p.source_q is None else p.source_q[None], H)[0], *(
        _scatter(grad, tensors, source, p.kv_heads) for grad, tensors, source in ((dk, p.k, p.source_k), (dv, p.v, p.source_v))
    )  # type: ignore[return-value]


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
        grads.append(part.to(t.dtype).contiguous())
    return grads

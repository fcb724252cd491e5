"""What a problem means token by token: labels, gathered tensors, tables at tokens, gains."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem


def gather(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, M, D), k and v (B, H, N, D): sources applied, key lists joined, kv heads repeated."""

    def take(tensors: tuple[Tensor, ...], source: Tensor | None) -> Tensor:
        parts = []
        for i, t in enumerate(tensors):
            t = t.expand(p.batch, *t.shape[1:]) if source is None else t[source[i]]
            parts.append(t)
        joined = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).to(dtype).transpose(1, 2)
        return joined.repeat_interleave(p.heads // p.kv_heads, 1) if p.heads != p.kv_heads else joined

    q = p.q if p.source_q is None else p.q[p.source_q]
    return q.to(dtype).transpose(1, 2), take(p.k, p.source_k), take(p.v, p.source_v)


def labels(
    lengths: tuple[int, ...], items: Tensor | None, batch: int, total: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(segment of each token, position of each token within its segment), both (batch, total) int64"""
    counts = torch.tensor([lengths]).expand(batch, -1) if items is None else items.long()
    ends = counts.to(device).cumsum(1)  # (batch, segments)
    token = torch.arange(total, device=device).expand(batch, total)
    label = (token[:, :, None] >= ends[:, None, :]).sum(-1)
    starts = torch.cat([ends.new_zeros(batch, 1), ends], 1)
    return label, token - starts.gather(1, label)


def expand_pairs(table: Tensor, a: Tensor, c: Tensor, heads: int) -> Tensor:
    """table (1|B, 1|H, R, C) at the labels a (B, M), c (B, N) -> (B, H, M, N)"""
    B, M = a.shape
    table = table.expand(B, heads, *table.shape[2:])
    rows = table.gather(2, a[:, None, :, None].expand(B, heads, M, table.shape[3]))
    return rows.gather(3, c[:, None, None, :].expand(B, heads, M, c.shape[1]))


def total_gain(p: Problem, mass: Tensor) -> Tensor:
    """(B, H, R) float32: the given gain times the one derived from the detached mass (B, H, R, C)."""
    shape = (p.batch, p.heads, len(p.row_lengths))
    given = mass.new_ones(shape) if p.gain is None else p.gain.to(mass.dtype).expand(shape)
    if p.head_gain is None:
        return given
    per_head = derived_gain(p, mass.detach())  # (B, H)
    applies = torch.zeros(shape[2], dtype=torch.bool)
    applies[list(p.head_gain.apply)] = True
    return torch.where(applies.to(mass.device), given * per_head[..., None], given)


def derived_gain(p: Problem, mass: Tensor) -> Tensor:
    """mass (B, H, R, C) -> gain (B, H); In-Context Brush (arXiv 2505.20271) Eqs. 6-8."""
    rule, values = p.head_gain, p.head_gain_values
    assert rule is not None and values is not None
    block = mass[:, :, list(rule.rows)][..., list(rule.keys)].sum((2, 3))
    if p.row_items is None:
        count: Tensor | int = max(sum(p.row_lengths[r] for r in rule.rows), 1)
    else:
        count = p.row_items[:, list(rule.rows)].sum(1, keepdim=True).clamp(min=1).to(mass.device)
    m = block / count
    eps = torch.finfo(torch.float32).eps
    if rule.norm == "minmax":
        low, high = m.amin(1, keepdim=True), m.amax(1, keepdim=True)
        relative = (m - low) / (high - low + eps)
    elif rule.norm == "mean":
        relative = m / m.mean(1, keepdim=True).clamp(min=eps)
    elif rule.norm == "max":
        relative = m / m.amax(1, keepdim=True).clamp(min=eps)
    else:
        relative = m.shape[1] * torch.softmax(m, 1)
    span, floor = values
    return floor + span * relative

"""The executable specification: materialises the attention map; float64 in, float64 throughout.

s_ij = scale * <q_i, k_j> + bias[h, a(i), c(j)]
p_ij = softmax over the keys of group(c(j))
o_i  = gain[h, a(i)] * sum_g gate_g(i) * sum_{c in g} weight[h, a(i), c] * sum_{j in c} phi(p_ij) v_j
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.problem import GainRule, Problem
from . import Result

name = "reference"


def why_not(problem: Problem) -> list[str]:
    return []


def available() -> list[str]:
    return []


def forward(problem: Problem) -> Result:
    """Any device, any dtype, differentiable with respect to q, k and v. Computes in float32, or float64 for
    float64.
    """
    p = problem
    B, M, H = p.batch, p.rows, p.heads
    dtype = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    q, k, v = gather(p, dtype)  # (B, H, M, D), (B, H, N, D), (B, H, N, D)
    a, _ = labels(p.row_lengths, p.row_items, B, M, q.device)  # (B, M)
    c, rank = labels(p.key_lengths, p.key_items, B, p.keys, q.device)  # (B, N), place within the segment

    allowed = torch.ones(B, 1, M, p.keys, dtype=torch.bool, device=q.device)
    if p.valid is not None:
        allowed = allowed & (rank < p.valid.gather(1, c))[:, None, None, :]
    added = []
    if p.bias is not None:
        added.append(expand_pairs(p.bias, a, c, H).to(dtype))
    if p.mask is not None and p.mask.dtype == torch.bool:
        allowed = allowed & p.mask
    elif p.mask is not None:
        added.append(p.mask.to(dtype))
    for bias in added:
        allowed = allowed & (bias != -math.inf)
    allowed = allowed.expand(B, H, M, p.keys)
    s = logits(q, k, allowed) * p.item_scale().to(dtype)
    for bias in added:
        s = s + bias
    weight = 1.0 if p.weight is None else expand_pairs(p.weight, a, c, H).to(dtype)
    group_of_key = torch.tensor(p.groups, device=q.device)[c]  # (B, N)

    out = torch.zeros_like(q)
    lse = torch.empty(
        B, H, M, p.n_groups, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=q.device
    )
    mass = s.new_zeros(B, H, len(p.row_lengths), len(p.key_lengths))
    rows_of = torch.nn.functional.one_hot(a, len(p.row_lengths)).to(dtype)  # (B, M, R)
    keys_of = torch.nn.functional.one_hot(c, len(p.key_lengths)).to(dtype)  # (B, N, C)
    for g in range(p.n_groups):
        mine = allowed & (group_of_key == g)[:, None, None, :]
        prob, lse[..., g] = masked_softmax(s, mine)
        mass = mass + torch.einsum("bmr,bhmn,bnc->bhrc", rows_of, prob.detach(), keys_of)
        contrast = p.contrast[g]
        if contrast is not None:
            count = mine.sum(-1, keepdim=True).clamp(min=1)
            prob = contrast.beta * prob - (contrast.beta - 1) / count
            if contrast.clip is not None:
                prob = prob.clamp(*contrast.clip)
            prob = torch.where(mine, prob, 0)
        part = sum_values(prob * weight, mine & (torch.as_tensor(weight) != 0), v)
        out = out + (part if p.gates is None else part * p.gates[:, None, :, g, None].to(dtype))

    gain = total_gain(p, mass)
    out = out * gain.to(dtype).gather(2, a[:, None, :].expand(B, H, M))[..., None]
    return Result(out.transpose(1, 2).to(p.q.dtype), lse.detach(), mass, gain)


def logits(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """<q_i, k_j> where a removed pair's key is not read, in the gradient of q either: its NaN or Inf stays
    out.
    """
    finite = torch.isfinite(k).all(-1)
    s = torch.einsum("bhmd,bhnd->bhmn", q, torch.where(finite[..., None], k, 0))
    for b, h, n in (~finite).nonzero().tolist():
        s[b, h, :, n] = (q[b, h] * torch.where(allowed[b, h, :, n, None], k[b, h, n], 0)).sum(-1)
    return s


def masked_softmax(s: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities, lse) over the allowed keys; a row without one gives 0 and -inf. NaN in an allowed logit
    spreads.
    """
    s = torch.where(allowed, s, -math.inf)
    # A softmax of its own: exp(s - lse) would lose what a large lse rounds away.
    prob = torch.softmax(torch.where(allowed.any(-1, keepdim=True), s, 0), -1)
    return torch.where(allowed, prob, 0), torch.logsumexp(s, -1)


def sum_values(prob: Tensor, allowed: Tensor, v: Tensor) -> Tensor:
    """sum_j prob_ij v_j where a removed pair's value is not read, in the gradient of prob either."""
    finite = torch.isfinite(v)
    out = prob @ torch.where(finite, v, 0)
    for b, h, n in (~finite).any(-1).nonzero().tolist():
        lost = torch.where(finite[b, h, n], 0, v[b, h, n])
        out[b, h] += prob[b, h, :, n, None] * torch.where(allowed[b, h, :, n, None], lost, 0)
    return out


def gather(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, M, D), k and v (B, H, N, D) in `dtype`: sources applied, key lists joined, kv heads repeated."""
    p = problem

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
    """(segment of each token, place of each token within its segment), both (batch, total) int64"""
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


def total_gain(problem: Problem, mass: Tensor) -> Tensor:
    """(B, H, R) float32: the given gain times the one derived from the mass (B, H, R, C), which is detached."""
    p = problem
    shape = (p.batch, p.heads, len(p.row_lengths))
    given = mass.new_ones(shape) if p.gain is None else p.gain.to(mass.dtype).expand(shape)
    if p.head_gain is None:
        return given
    per_head = derive_gain(p.head_gain, mass.detach(), p.row_lengths, p.row_items)  # (B, H)
    applies = torch.zeros(shape[2], dtype=torch.bool)
    applies[list(p.head_gain.apply)] = True
    return torch.where(applies.to(mass.device), given * per_head[..., None], given)


def derive_gain(
    rule: GainRule, mass: Tensor, row_lengths: tuple[int, ...], row_items: Tensor | None
) -> Tensor:
    """mass (B, H, R, C) -> gain (B, H); In-Context Brush (arXiv 2505.20271) Eqs. 6-8."""
    block = mass[:, :, list(rule.rows)][..., list(rule.keys)].sum((2, 3))
    if row_items is None:
        count: Tensor | int = max(sum(row_lengths[r] for r in rule.rows), 1)
    else:
        count = row_items[:, list(rule.rows)].sum(1, keepdim=True).clamp(min=1).to(mass.device)
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
    return rule.floor + rule.span * relative

"""The executable specification of attention. It makes the attention map; float64 inputs stay float64
throughout.

s_ij = scale * <q_i, k_j> + bias[h, a(i), c(j)]                      a(i): the row's segment, c(j): the key's
p_ij = softmax over the keys of group(c(j))
o_i  = gain[h, a(i)] * sum_g gate_g(i) * sum_{c in g} weight[h, a(i), c] * sum_{j in c} phi(p_ij) v_j
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.problem import Problem
from ..core.semantics import expand_pairs, gather, labels, total_gain
from .interface import Operator, Result, never

name = "reference"


def available() -> list[str]:
    return []


def forward(problem: Problem, round_map_to: torch.dtype | None = None) -> Result:
    """Any device, any dtype, differentiable in q, k and v. Computes in float32, or in float64 for float64.

    Args:
        problem: the call.
        round_map_to: round the weighted probabilities to this dtype before they multiply the values, as eager
            code in that dtype does. For the checks, which allow a backend a multiple of eager code's error.
            None: no rounding.
    """
    p = problem
    B, M, H = p.batch, p.rows, p.heads
    dtype = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    q, k, v = gather(p, dtype)  # (B, H, M, D), (B, H, N, D), (B, H, N, D)
    a, _ = labels(p.row_lengths, p.row_items, B, M, q.device)  # (B, M)
    c, rank = labels(p.key_lengths, p.key_items, B, p.keys, q.device)  # (B, N), position within the segment

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
        factor = prob * weight
        if round_map_to is not None:
            factor = factor.to(round_map_to).to(dtype)
        part = sum_values(factor, mine & (torch.as_tensor(weight) != 0), v)
        out = out + (part if p.gates is None else part * p.gates[:, None, :, g, None].to(dtype))

    gain = total_gain(p, mass)
    out = out * gain.to(dtype).gather(2, a[:, None, :].expand(B, H, M))[..., None]
    return Result(out.transpose(1, 2).to(p.q.dtype), lse.detach(), mass, gain)


def logits(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """<q_i, k_j>. A removed pair's key is not read, nor in the gradient of q: its NaN or Inf stays out."""
    finite = torch.isfinite(k).all(-1)
    s = torch.einsum("bhmd,bhnd->bhmn", q, torch.where(finite[..., None], k, 0))
    for b, h, n in (~finite).nonzero().tolist():
        s[b, h, :, n] = (q[b, h] * torch.where(allowed[b, h, :, n, None], k[b, h, n], 0)).sum(-1)
    return s


def masked_softmax(s: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities, lse) over the allowed keys. A row without one gives 0 and -inf; a NaN logit spreads."""
    s = torch.where(allowed, s, -math.inf)
    # Not exp(s - lse): a large lse has lost the low digits of s.
    prob = torch.softmax(torch.where(allowed.any(-1, keepdim=True), s, 0), -1)
    return torch.where(allowed, prob, 0), torch.logsumexp(s, -1)


def sum_values(prob: Tensor, allowed: Tensor, v: Tensor) -> Tensor:
    """sum_j prob_ij v_j. A removed pair's value is not read, nor in the gradient of prob."""
    finite = torch.isfinite(v)
    out = prob @ torch.where(finite, v, 0)
    for b, h, n in (~finite).any(-1).nonzero().tolist():
        lost = torch.where(finite[b, h, n], 0, v[b, h, n])
        out[b, h] += prob[b, h, :, n, None] * torch.where(allowed[b, h, :, n, None], lost, 0)
    return out


OPERATORS = {"attention": Operator(forward, never)}

"""Gradient of the operator on every device: the map is recomputed from the LSE, a block of rows at a time.

    a_ij = gain * gate_g(i) * weight      dP_ij = a_ij <do_i, v_j>      delta_g(i) = sum_{j in g} p_ij dP_ij
    dS = p (dP - delta_g)                 dq = scale dS k    dk = scale dS^T q    dv = sum_i a_ij p_ij do_i

delta is taken per group: rowsum(do * o) of the total output is wrong as soon as there are two groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.problem import Problem
from ...core.recomputed_map import blocks, compute_dtype, only, softmax_backward, to_keys, to_query
from ...core.semantics import gather


def backward(
    problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, gain: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dout and out (B, M, H, D), lse (B, H, M, G), gain (B, H, R) -> dq, and dk and dv, one for each of k and
    v.
    """
    p = problem
    B, M, H = p.batch, p.rows, p.heads
    if B * M * H == 0 or p.keys == 0:
        return torch.zeros_like(p.q), [torch.zeros_like(t) for t in p.k], [torch.zeros_like(t) for t in p.v]
    q, k, v = gather(p, compute_dtype(p))
    do = dout.to(q.dtype).transpose(1, 2)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for b in blocks(p, q, k, lse):
        values = only(b.allowed, v if b.weight is None else only(b.weight[:, :, 0] != 0, v))
        factor = gain.to(q.dtype).gather(2, b.label[:, None, :].expand(B, H, -1))[
            ..., None
        ]  # (B, H, rows, 1)
        if b.weight is not None:
            factor = factor * b.weight
        if p.gates is not None:
            gates = p.gates.to(q.dtype)[:, None].expand(B, H, M, p.n_groups)[:, :, b.rows]
            factor = factor * gates.gather(3, b.group)
        dprob = factor * torch.einsum("bhmd,bhnd->bhmn", do[:, :, b.rows], values)
        ds = softmax_backward(p, b, dprob)
        dq[:, :, b.rows] += only(b.mine, ds @ b.k)
        dk += only(b.allowed, ds.transpose(2, 3) @ q[:, :, b.rows])
        dv += only(b.allowed, (factor * b.prob).transpose(2, 3) @ do[:, :, b.rows])
    return to_query(p, dq), to_keys(p, dk, p.k, p.source_k), to_keys(p, dv, p.v, p.source_v)

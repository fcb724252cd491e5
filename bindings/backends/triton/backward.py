"""The gradient of the attention in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.problem import Problem
from ..gpu.constants import blocks, starts
from ..gpu.device import arch, on_device
from . import launch


def backward(
    problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, gain: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dout and out (B, M, H, D), lse (B, H, M, G), gain (B, H, R) -> dq, and dk and dv, one for each of k and
    v.
    """
    with on_device(problem.q):
        return _backward(problem, dout, out, lse, gain)


def _backward(
    problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, gain: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dout and out (B, M, H, D), lse (B, H, M, G), gain (B, H, R) -> dq, and dk and dv, one for each of k and
    v.

    Deterministic: no atomic addition. Extra memory: delta, like lse, and float32 gradients of every output
        item
    where `source` or a broadcast lets several of them read one item.
    """
    from ....kernels.attention.backward import attention_backward
    from ....kernels.attention.tiles import backward_tiles
    from ....kernels.collect_items import collect_items

    p, device = problem, problem.q.device
    dout = dout.to(p.q.dtype)
    dout = dout if dout.stride(3) == 1 or p.dim == 1 else dout.contiguous()
    pieces = launch.Pieces.of(p, per_segment=False)
    R, C = len(p.row_lengths), len(p.key_lengths)

    def gradients(tensors: Sequence[Tensor], source: Tensor | None) -> list[Tensor]:
        shared = source is not None or any(t.shape[0] != p.batch for t in tensors)
        dtype = torch.float32 if shared else p.q.dtype
        return [torch.empty(p.batch, *t.shape[1:], dtype=dtype, device=device) for t in tensors]

    (dq,) = gradients([p.q], p.source_q)
    dks, dvs = gradients(p.k, p.source_k), gradients(p.v, p.source_v)
    by_query, by_key = backward_tiles(arch(device), p.dim, p.q.element_size(), p.n_groups > 1)
    aligned = [p.q, *p.k, *p.v, out, dout, dq, *dks, *dvs]
    query_traits = launch.make_traits(p, by_query, pieces, aligned)
    key_traits = launch.make_traits(p, by_key, pieces, aligned, RAGGED=p.key_items is not None)
    attention_backward(
        p.q,
        p.k,
        p.v,
        out,
        dout,
        dq,
        dks,
        dvs,
        lse.contiguous(),
        torch.empty_like(lse, memory_format=torch.contiguous_format),
        gain.to(torch.float32).contiguous(),
        (query_traits, by_query.warps, by_query.stages),
        (key_traits, by_key.warps, by_key.stages),
        row_blocks=blocks(p.row_lengths, p.row_items, by_query.block_m),
        key_blocks=blocks(pieces.lengths, p.key_items, by_key.block_n),
        row_starts=starts(p.row_lengths, p.row_items, device),
        row_segments=R,
        key_segments=C,
        scale=p.scale,
        scales=launch.table(p.scales),
        bias=launch.table(p.bias),
        weight=launch.table(p.weight),
        gates=launch.table(p.gates),
        valid=p.valid,
        source_q=p.source_q,
        source_k=p.source_k,
        source_v=p.source_v,
        order=launch.piece_order(p, pieces),
        piece_groups=launch.piece_groups(p, pieces),
        **launch.piece_arguments(p, pieces),
    )

    def collect(grad: Tensor, t: Tensor, source: Tensor | None) -> Tensor:
        if source is None and t.shape[0] == p.batch:
            return grad.to(t.dtype)
        total = torch.empty(t.shape, dtype=t.dtype, device=device)
        if total.numel():
            collect_items(grad, source, total, query_traits.EMULATE)
        return total

    def collect_list(
        grads: list[Tensor], tensors: tuple[Tensor, ...], sources: Tensor | None
    ) -> list[Tensor]:
        rows = [None] * len(grads) if sources is None else list(sources)
        return [collect(g, t, s) for g, t, s in zip(grads, tensors, rows, strict=True)]

    return (
        collect(dq, p.q, p.source_q),
        collect_list(dks, p.k, p.source_k),
        collect_list(dvs, p.v, p.source_v),
    )

"""The gradient of the attention in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.problem import Problem
from ..gpu.constants import blocks, starts
from ..gpu.device import arch, on_device


def backward(
    problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, gain: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    with on_device(problem.q):
        return _backward(problem, dout, out, lse, gain)


def _backward(
    problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, gain: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of q, k and v; deterministic, without atomic additions.

    Extra memory: delta, of lse's size, and float32 gradients of every output item where `source` or a
    broadcast lets several of them read one item.

    Args:
        problem: the problem.
        dout: (B, M, H, D), the gradient of the result.
        out: (B, M, H, D), the result.
        lse: (B, H, M, G).
        gain: (B, H, R), given and derived.

    Returns:
        dq, then dk and dv, one for each tensor of k and v.
    """
    from ....kernels.attention.arguments import key_tensors, row_tensor
    from ....kernels.attention.backward import key_gradient, query_gradient
    from ....kernels.attention.tiles import backward_tiles
    from . import launch

    p, device = problem, problem.q.device
    dout = dout.to(p.q.dtype)
    dout = dout if dout.stride(3) == 1 or p.dim == 1 else dout.contiguous()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    gain = gain.to(torch.float32)
    ranges = launch.KeyRanges.of(p, per_segment=False)
    (dq,) = _gradients(p, [p.q], p.source_q)
    dks, dvs = _gradients(p, p.k, p.source_k), _gradients(p, p.v, p.source_v)
    by_rows, by_keys = backward_tiles(arch(device), p.dim, p.q.element_size(), p.n_groups > 1)
    strided = [p.q, *p.k, *p.v, out, dout, dq, *dks, *dvs]
    row_traits = launch.make_traits(p, by_rows, ranges, strided)
    key_traits = row_traits._replace(
        BLOCK_M=by_keys.block_m, BLOCK_N=by_keys.block_n, RAGGED=p.key_items is not None
    )
    row_starts = starts(p.row_lengths, p.row_items, device)
    inputs = launch.pack_inputs(p, launch.pack_layout(p, ranges, row_starts, "rows"), gain)
    query_gradient(
        inputs,
        row_tensor(out),
        row_tensor(dout),
        row_tensor(dq),
        lse,
        delta,
        launch.count(p, ranges, blocks(p.row_lengths, p.row_items, by_rows.block_m)),
        row_traits,
        by_rows,
    )
    key_gradient(
        inputs._replace(layout=launch.pack_layout(p, ranges, row_starts, "keys")),
        row_tensor(dout),
        key_tensors(dks),
        key_tensors(dvs),
        lse,
        delta,
        launch.count(p, ranges, blocks(ranges.lengths, p.key_items, by_keys.block_n)),
        key_traits,
        by_keys,
    )
    emulate = row_traits.EMULATE_BF16
    return (
        _collect(p, [dq], [p.q], None if p.source_q is None else [p.source_q], emulate)[0],
        _collect(p, dks, p.k, p.source_k, emulate),
        _collect(p, dvs, p.v, p.source_v, emulate),
    )


def _gradients(p: Problem, tensors: Sequence[Tensor], source: Tensor | None) -> list[Tensor]:
    """Tensors for the gradients of every output item, (B, tokens, heads, D); float32 if summed later."""
    shared = source is not None or any(t.shape[0] != p.batch for t in tensors)
    dtype = torch.float32 if shared else p.q.dtype
    return [torch.empty(p.batch, *t.shape[1:], dtype=dtype, device=t.device) for t in tensors]


def _collect(
    p: Problem,
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    sources: Sequence[Tensor] | Tensor | None,
    emulate: bool,
) -> list[Tensor]:
    """The gradient of each tensor: the sum over the output items that read an item of it."""
    from ....kernels.collect_items import collect_items

    collected = []
    for i, (grad, t) in enumerate(zip(grads, tensors, strict=True)):
        source = None if sources is None else sources[i]
        if source is None and t.shape[0] == p.batch:
            collected.append(grad.to(t.dtype))
            continue
        total = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        if total.numel():
            collect_items(grad, source, total, emulate)
        collected.append(total)
    return collected

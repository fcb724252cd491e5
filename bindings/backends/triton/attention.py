"""Fused attention in Triton: one kernel over segments, light ones for the derived head gain, and their
gradient.

Verified in Triton's interpreter and compiled for GPUs that are not there; not yet run on hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.problem import Problem
from ..gpu import statistics
from ..gpu.constants import blocks, constant, starts
from ..gpu.device import arch, multiprocessors, on_device
from ..interface import Result
from . import launch

if TYPE_CHECKING:
    from ....kernels.attention.tiles import Tile


def forward(problem: Problem) -> Result:
    with on_device(problem.q):
        return _forward(problem)


def _forward(p: Problem) -> Result:
    from ....kernels.attention.forward import attention_forward

    device, B, H, G = p.q.device, p.batch, p.heads, p.n_groups
    R, C = len(p.row_lengths), len(p.key_lengths)
    out = torch.empty(B, p.rows, H, p.dim, dtype=p.q.dtype, device=device) if p.out is None else p.out
    kinds = [0 if c is None else 1 + (c.clip is not None) for c in p.contrast]
    pieces = launch.Pieces.of(p, per_segment=p.need_mass or any(kinds))
    tile = _tile(p, pieces)
    row_blocks = blocks(p.row_lengths, p.row_items, tile.block_m)
    row_starts = starts(p.row_lengths, p.row_items, device) if R > 1 or p.need_mass else None
    described = _describe(p, tile)
    traits = launch.make_traits(
        p,
        tile,
        pieces,
        [p.q, *p.k, *p.v, out],
        DESCRIBED=described is not None,
        SILENT=p.weight is not None or 2 in kinds,
        UNCLIPPED=1 in kinds,
        CLIPPED=2 in kinds,
        SIGNED=p.scales is not None or p.scale < 0,
        MASS=launch.power_of_two(C) if p.need_mass else 0,
        PERSISTENT=tile.persistent,
        SPECIALIZED=tile.specialized,
    )
    lse = torch.empty(B, H, p.rows, G, dtype=torch.float32, device=device) if p.need_stats else None
    partial = torch.empty(B, H, row_blocks, C, dtype=torch.float32, device=device) if p.need_mass else None
    keys = launch.piece_arguments(p, pieces)
    sums = statistics.value_sums(p, tile.block_n, keys["key_starts"]) if 1 in kinds else None
    attention_forward(
        p.q,
        p.k,
        p.v,
        out,
        traits,
        warps=tile.warps,
        stages=tile.stages,
        row_blocks=row_blocks,
        row_segments=R,
        key_segments=C,
        programs=multiprocessors(device) if tile.persistent else None,
        scale=p.scale,
        scales=launch.table(p.scales),
        bias=launch.table(p.bias),
        weight=launch.table(p.weight),
        gain=None if p.head_gain is not None else launch.table(p.gain),
        gates=launch.table(p.gates),
        row_starts=row_starts,
        valid=p.valid,
        source_q=p.source_q,
        source_k=p.source_k,
        source_v=p.source_v,
        contrast=_contrast(p, kinds, device) if any(kinds) else None,
        value_sums=sums,
        order=launch.piece_order(p, pieces),
        descriptors=described,
        lse=lse,
        partial=partial,
        **keys,
    )
    mass = gain = None
    if partial is not None:
        assert row_starts is not None
        mass, gain = statistics.mass_and_gain(p, out, partial, row_starts, tile.block_m)
    return Result(out, lse, mass, gain)


def _tile(p: Problem, pieces: launch.Pieces) -> Tile:
    from ....kernels.attention import tiles

    mass = launch.power_of_two(len(p.key_lengths)) if p.need_mass else 0
    return tiles.forward_tile(
        arch(p.q.device), p.dim, p.q.element_size(), p.n_groups > 1, mass, bool(pieces.labels)
    )


def _describe(p: Problem, tile: Tile):
    """Descriptors of the keys and the values, where the tile asks for them and the layout allows them."""
    from ....kernels.attention.blocks import describe

    key, value = p.k[0], p.v[0]
    if not tile.descriptors or len(p.k) > 1 or p.dim & (p.dim - 1) or p.dim < 16:
        return None
    k = describe(key, p.source_k is None and key.shape[0] == 1)
    v = describe(value, p.source_v is None and value.shape[0] == 1)
    return None if k is None or v is None else (k, v)


def _contrast(p: Problem, kinds: list[int], device: torch.device) -> Tensor:
    flat: list[float] = []
    for c, kind in zip(p.contrast, kinds, strict=True):
        flat += [float(kind), *((1.0, 0.0, 0.0) if c is None else (c.beta, *(c.clip or (0.0, 0.0))))]
    return constant(tuple(flat), torch.float32, device)

"""Fused attention in Triton: one kernel, and three small ones after it for the mass and the head gain.

Verified in Triton's interpreter and compiled for sm_80, sm_90 and sm_120; not yet run on hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...core.problem import Problem
from ..gpu import statistics
from ..gpu.constants import blocks, constant, starts
from ..gpu.device import arch, on_device
from ..interface import Result

if TYPE_CHECKING:
    from ....kernels.attention.arguments import Contrast, MatrixDescriptor


def forward(problem: Problem) -> Result:
    """The attention of a problem; deterministic.

    Extra memory: with a mass, (B, H, row blocks, C) float32; with a contrast without clip, (B, Hkv, C, D)
    float32.
    """
    with on_device(problem.q):
        return _forward(problem)


def _forward(p: Problem) -> Result:
    from ....kernels.attention import tiles
    from ....kernels.attention.arguments import Outputs, row_tensor
    from ....kernels.attention.forward import attention_forward
    from . import launch

    device, B, H, G = p.q.device, p.batch, p.heads, p.n_groups
    R, C = len(p.row_lengths), len(p.key_lengths)
    linear = any(c is not None and c.clip is None for c in p.contrast)
    clipped = any(c is not None and c.clip is not None for c in p.contrast)
    ranges = launch.KeyRanges.of(p, per_segment=p.need_mass or linear or clipped)
    mass_width = launch.power_of_two(C) if p.need_mass else 0
    tile = tiles.forward_tile(
        arch(device), p.dim, p.q.element_size(), G > 1, mass_width, mixed=bool(ranges.labels)
    )
    row_blocks = blocks(p.row_lengths, p.row_items, tile.block_m)
    row_starts = starts(p.row_lengths, p.row_items, device) if R > 1 or p.need_mass else None
    layout = launch.pack_layout(p, ranges, row_starts, "rows")

    out = torch.empty(B, p.rows, H, p.dim, dtype=p.q.dtype, device=device) if p.out is None else p.out
    lse = torch.empty(B, H, p.rows, G, dtype=torch.float32, device=device) if p.need_stats else None
    partial = torch.empty(B, H, row_blocks, C, dtype=torch.float32, device=device) if p.need_mass else None
    descriptors = _descriptors(p) if tile.descriptors else None
    traits = launch.make_traits(
        p,
        tile,
        ranges,
        [p.q, *p.k, *p.v, out],
        DESCRIPTORS=descriptors is not None,
        SKIP_PV=p.weight is not None or clipped,
        LINEAR_CONTRAST=linear,
        CLIPPED_CONTRAST=clipped,
        NEGATIVE_SCALE=p.scales is not None or p.scale < 0,
        MASS_WIDTH=mass_width,
    )
    contrast = _contrast(p, tile.block_n, linear) if linear or clipped else None
    # A derived gain needs the mass of all rows first: mass_and_gain applies it, and the given one with it.
    gain = None if p.head_gain is not None else p.gain
    attention_forward(
        launch.pack_inputs(p, layout, gain, contrast),
        Outputs(row_tensor(out), lse, partial),
        launch.count(p, ranges, row_blocks),
        traits,
        tile,
        descriptors,
    )
    mass = gain = None
    if partial is not None:
        assert row_starts is not None
        mass, gain = statistics.mass_and_gain(p, out, partial, row_starts, tile.block_m)
    return Result(out, lse, mass, gain)


def _descriptors(p: Problem) -> tuple[MatrixDescriptor, MatrixDescriptor] | None:
    """The keys and the values as matrices for tensor descriptors, if their layout allows it."""
    from ....kernels.attention.arguments import describe_matrix

    key, value = p.k[0], p.v[0]
    if len(p.k) > 1 or p.dim & (p.dim - 1) or p.dim < 16:
        return None
    k = describe_matrix(key, p.source_k is None and key.shape[0] == 1)
    v = describe_matrix(value, p.source_v is None and value.shape[0] == 1)
    return None if k is None or v is None else (k, v)


def _contrast(p: Problem, block_n: int, linear: bool) -> Contrast:
    """The rules of each group, and the sums of values that a contrast without clip adds."""
    from ....kernels.attention.arguments import Contrast
    from ....kernels.attention.forward import CLIPPED, LINEAR

    rules: list[float] = []
    for c in p.contrast:
        if c is None:
            rules += (0.0, 1.0, 0.0, 0.0)
        elif c.clip is None:
            rules += (float(LINEAR.value), c.beta, 0.0, 0.0)
        else:
            rules += (float(CLIPPED.value), c.beta, *c.clip)
    key_starts = starts(p.key_lengths, p.key_items, p.q.device) if len(p.key_lengths) > 1 else None
    return Contrast(
        constant(tuple(rules), torch.float32, p.q.device),
        statistics.value_sums(p, block_n, key_starts) if linear else None,
    )

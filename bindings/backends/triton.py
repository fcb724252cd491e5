"""Fused attention in Triton, forward: one kernel over segments, and light ones for the derived head gain.

Verified in Triton's interpreter and compiled for sm_80 and sm_90; not yet run on hardware.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..problem import Problem
from . import Result

if TYPE_CHECKING:
    from ...kernels.attention_tiles import Tile

name = "triton"

OLDEST = (3, 6)  # tuples of pointers as kernel arguments, and what the kernels are compiled with in the tests
MOST_TENSORS = 32
MOST_MASS_SEGMENTS = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return [f"triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"]
    if not torch.cuda.is_available() and not interpreted():
        return ["no GPU is visible to torch"]
    return []


def why_not(problem: Problem) -> list[str]:
    p, reasons = problem, []
    if p.q.device.type != "cuda" and not interpreted():
        reasons.append(f"no Triton kernels for {p.q.device.type} tensors")
    if p.q.device.type == "cuda" and interpreted():
        reasons.append("Triton runs in its interpreter")
    if p.q.dtype not in DTYPES:
        reasons.append(f"{p.q.dtype} is not among float32, bfloat16 and float16")
    if p.mask is not None:
        reasons.append("a dense mask is not a table over segments")
    if len(p.k) > MOST_TENSORS:
        reasons.append(f"{len(p.k)} key tensors are more than {MOST_TENSORS}")
    if p.need_mass and len(p.key_lengths) > MOST_MASS_SEGMENTS:
        reasons.append(f"the mass of {len(p.key_lengths)} key segments, more than {MOST_MASS_SEGMENTS}")
    return reasons


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def forward(problem: Problem) -> Result:
    with torch.cuda.device(problem.q.device) if problem.q.is_cuda else contextlib.nullcontext():
        return _forward(problem)


def _forward(p: Problem) -> Result:
    from ...kernels import attention_blocks as blocks
    from ...kernels import attention_statistics as statistics
    from ...kernels.attention_forward import attention_forward
    from ...kernels.attention_tiles import split_dim

    device, B, H, G = p.q.device, p.batch, p.heads, p.n_groups
    R, C = len(p.row_lengths), len(p.key_lengths)
    out = torch.empty(B, p.rows, H, p.dim, dtype=p.q.dtype, device=device) if p.out is None else p.out
    tile = _tile(p)
    row_blocks = _row_blocks(p, tile.block_m)
    row_starts = _starts(p.row_lengths, p.row_items, device) if R > 1 or p.need_mass else None
    key_starts = _starts(p.key_lengths, p.key_items, device) if C > 1 else None
    described = _describe(p, tile)
    kinds = [0 if c is None else 1 + (c.clip is not None) for c in p.contrast]
    parts = split_dim(p.dim, p.q.element_size())
    traits = blocks.Traits(
        D=p.dim,
        PARTS=parts,
        FIRSTS=tuple(accumulate(parts, initial=0))[:-1],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        TENSORS=len(p.k),
        HEADS_PER_KV=H // p.kv_heads,
        ALIGN=blocks.alignment([p.q, *p.k, *p.v, out]),
        DESCRIBED=described is not None,
        RAGGED=p.row_items is not None,
        GROUPED=G > 1,
        SILENT=p.weight is not None or 2 in kinds,
        UNCLIPPED=1 in kinds,
        CLIPPED=2 in kinds,
        SIGNED=p.scales is not None or p.scale < 0,
        MASS=_power_of_two(C) if p.need_mass else 0,
        PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        EMULATE=interpreted() and p.q.dtype == torch.bfloat16,
    )
    lse = torch.empty(B, H, p.rows, G, dtype=torch.float32, device=device) if p.need_stats else None
    partial = torch.empty(B, H, row_blocks, C, dtype=torch.float32, device=device) if p.need_mass else None
    keys = {"key_starts": key_starts, "valid": p.valid, "source_v": p.source_v}
    attention_forward(
        p.q, p.k, p.v, out, traits,
        warps=tile.warps, stages=tile.stages, row_blocks=row_blocks, row_segments=R, key_segments=C, groups=G,
        scale=p.scale, scales=_table(p.scales), bias=_table(p.bias), weight=_table(p.weight),
        gain=None if p.head_gain is not None else _table(p.gain), gates=_table(p.gates),
        row_starts=row_starts, order=_order(p.groups, G, device) if G > 1 else None,
        source_q=p.source_q, source_k=p.source_k,
        contrast=_contrast(p, kinds, device) if any(kinds) else None,
        value_sums=statistics.value_sums(p.v, B, C, traits, **keys) if 1 in kinds else None,
        descriptors=described, lse=lse, partial=partial, **keys,
    )  # fmt: skip
    mass = gain = None
    if partial is not None:
        assert row_starts is not None
        mass = statistics.sum_mass(partial, row_starts, R, tile.block_m)
    if p.head_gain is not None:
        assert mass is not None and row_starts is not None
        rule = p.head_gain
        flags = (*_flags(rule.rows, R), *_flags(rule.apply, R), *_flags(rule.keys, C))
        gain = statistics.head_gain(
            mass, _constant(flags, torch.int32, device), row_starts, rule.norm, _number(rule.span, device),
            _number(rule.floor, device), _table(p.gain),
        )  # fmt: skip
        statistics.scale_rows(out, gain, row_starts, traits, tile.block_m, row_blocks)
    elif p.need_stats:
        gain = torch.ones(B, H, R, dtype=torch.float32, device=device)
        if p.gain is not None:
            gain *= p.gain
    return Result(out, lse, mass, gain)


def _tile(p: Problem) -> Tile:
    from ...kernels.attention_tiles import forward_tile

    mass = _power_of_two(len(p.key_lengths)) if p.need_mass else 0
    return forward_tile(_arch(p.q.device), p.dim, p.q.element_size(), p.n_groups > 1, mass)


def _describe(p: Problem, tile: Tile):
    """Descriptors of the keys and the values, where the tile asks for them and the layout allows them."""
    from ...kernels.attention_blocks import describe

    key, value = p.k[0], p.v[0]
    if not tile.descriptors or len(p.k) > 1 or p.dim & (p.dim - 1) or p.dim < 16:
        return None
    k = describe(key, p.source_k is None and key.shape[0] == 1)
    v = describe(value, p.source_v is None and value.shape[0] == 1)
    return None if k is None or v is None else (k, v)


@functools.cache
def _arch(device: torch.device) -> int:
    """Compute capability times 10; 0 where there is none."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _row_blocks(p: Problem, block_m: int) -> int:
    """Row blocks of an item, at most, where each row segment begins a new one."""
    if p.row_items is None:
        return sum(-(-length // block_m) for length in p.row_lengths)
    return p.rows // block_m + min(len(p.row_lengths), p.rows)


def _starts(lengths: tuple[int, ...], items: Tensor | None, device: torch.device) -> Tensor:
    """(1|B, segments + 1) int32 starts, the end last."""
    if items is None:
        return _constant(tuple(accumulate(lengths, initial=0)), torch.int32, device)[None]
    return torch.nn.functional.pad(items.cumsum(1, dtype=torch.int32), (1, 0))


def _order(groups: tuple[int, ...], n_groups: int, device: torch.device) -> Tensor:
    """The key segments sorted by group, then each group's first place among them."""
    order = sorted(range(len(groups)), key=lambda c: groups[c])
    firsts = accumulate((groups.count(g) for g in range(n_groups)), initial=0)
    return _constant((*order, *firsts), torch.int32, device)


def _contrast(p: Problem, kinds: list[int], device: torch.device) -> Tensor:
    flat: list[float] = []
    for c, kind in zip(p.contrast, kinds, strict=True):
        flat += [float(kind), *((1.0, 0.0, 0.0) if c is None else (c.beta, *(c.clip or (0.0, 0.0))))]
    return _constant(tuple(flat), torch.float32, device)


def _flags(indices: Sequence[int], count: int) -> list[int]:
    return [int(i in indices) for i in range(count)]


def _table(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _number(x: float | Tensor, device: torch.device) -> Tensor:
    return x if isinstance(x, Tensor) else _constant((x,), torch.float32, device)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of static structure, kept by content: only its first use copies to the device."""
    return torch.tensor(values, dtype=dtype, device=device)

"""Attention from the vendor's attention with LSE: one call per key segment, merged.

    out_g = sum_c weight_c * exp(lse_c + bias_c - lse_g) * out_c        lse_g = log sum_c exp(lse_c + bias_c)

The vendor's calls know no tables: a key segment takes one call per run of neighbouring row segments that see
    it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.problem import DIMS, Problem
from ...core.semantics import total_gain
from ..interface import Result
from . import vendor_sdpa as sdpa


def why_not(problem: Problem) -> list[str]:
    p, reasons = problem, []
    if not sdpa.has_lse(p.q.device):
        reasons.append(f"no attention with LSE is known on {p.q.device.type}")
    if p.q.device.type == "cuda" and p.q.dtype == torch.float64:
        reasons.append("no float64 attention with LSE on CUDA")
    if any(c is not None and c.clip is not None for c in p.contrast):
        reasons.append("a clipped contrast needs the attention map")
    if p.mask is not None and any(c is not None for c in p.contrast):
        reasons.append("contrast with a dense mask")
    if (p.row_items is not None or p.key_items is not None) and p.q.device.type != "cpu":
        reasons.append("segment lengths that differ from item to item, off the CPU")
    return reasons


def forward(problem: Problem) -> Result:
    """Segment lengths that differ between items take one call per item; only the CPU takes such problems."""
    p = problem
    if p.q.device.type == "cpu" and any(t is not None for t in (p.row_items, p.key_items, p.valid)):
        parts = [_uniform(*item(p, b)) for b in range(p.batch)]
        out, lse, mass, gain = (torch.cat(column) for column in zip(*parts, strict=True))
        return Result(out, lse, mass, gain)
    return Result(*_uniform(p, None))


def item(p: Problem, b: int) -> tuple[Problem, list[int] | None]:
    """Item b as a problem of batch 1, and the number of keys that exist in each segment (None: all)."""

    def pick(table: Tensor | None) -> Tensor | None:
        return None if table is None else table[b : b + 1] if table.shape[0] > 1 else table

    def take(tensors: tuple[Tensor, ...], source: Tensor | None) -> tuple[Tensor, ...]:
        items = [
            (b if t.shape[0] > 1 else 0) if source is None else int(source[i, b])
            for i, t in enumerate(tensors)
        ]
        return tuple(t[n : n + 1] for n, t in zip(items, tensors, strict=True))

    n = b if p.source_q is None else int(p.source_q[b])
    rows = p.row_lengths if p.row_items is None else tuple(p.row_items[b].tolist())
    keys = p.key_lengths if p.key_items is None else tuple(p.key_items[b].tolist())
    exist = (
        None
        if p.valid is None
        else [min(max(a, 0), n) for a, n in zip(p.valid[b].tolist(), keys, strict=True)]
    )
    tables = {name: pick(getattr(p, name)) for name, dims in DIMS.items() if dims.startswith("B")}
    single = p.changed(**tables).changed(
        q=p.q[n : n + 1],
        k=take(p.k, p.source_k),
        v=take(p.v, p.source_v),
        batch=1,
        row_lengths=rows,
        key_lengths=keys,
        row_items=None,
        key_items=None,
        valid=None,
        source_q=None,
        source_k=None,
        source_v=None,
        mask=None if p.mask is None else pick(p.mask.reshape((1,) * (4 - p.mask.dim()) + p.mask.shape)),
    )
    return single, exist


def _uniform(p: Problem, exist: list[int] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, M, D, G = p.batch, p.heads, p.rows, p.dim, p.n_groups
    R, C = len(p.row_lengths), len(p.key_lengths)
    dtype = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    device = p.q.device
    q = (p.q if p.source_q is None else p.q[p.source_q]).transpose(1, 2)
    scale = p.scale
    if p.scales is not None:
        q, scale = (q * p.item_scale()).to(q.dtype), 1.0
    row_of = torch.repeat_interleave(torch.arange(R), torch.tensor(p.row_lengths)).to(device)  # (M,)
    starts = (*p.row_starts(), M)

    acc = torch.zeros(B, H, M, D, dtype=dtype, device=device)
    lse = torch.full((B, H, M, G), -math.inf, dtype=dtype, device=device)
    mass = torch.zeros(B, H, R, C, dtype=dtype, device=device)
    gate = None if p.gates is None else p.gates.to(dtype)[:, None]  # (1|B, 1, 1|M, G)
    for g in range(G):
        group_acc, segment_lse = torch.zeros_like(acc), []
        # Sums are relative to the largest lse so far: added to an lse of 1e9, their logarithm would be lost.
        top = torch.full((B, H, M), -math.inf, dtype=dtype, device=device)
        total = torch.zeros(B, H, M, dtype=dtype, device=device)
        count = torch.zeros(B, H, M, 1, dtype=dtype, device=device)
        group_sum = torch.zeros_like(acc) if p.contrast[g] else None
        shift = _mask_shift(p, g, dtype)  # (1|B, 1|H, 1|M)
        for c in (c for c in range(C) if p.groups[c] == g):
            n = p.key_lengths[c] if exist is None else exist[c]
            keys, values, mask = _segment(p, c, n, shift)
            bias = None if p.bias is None else p.bias[..., c].to(dtype)[:, :, row_of]  # (1|B, 1|H, M)
            weight = None if p.weight is None else p.weight[..., c].to(dtype)[:, :, row_of, None]
            this = torch.full((B, H, M), -math.inf, dtype=dtype, device=device)
            for first, last in _runs(p, c) if n else ():
                rows = slice(starts[first], starts[last])
                part, part_lse = sdpa.attention_with_lse(
                    q[:, :, rows],
                    keys,
                    values,
                    scale,
                    mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows],
                )
                part_lse = part_lse.to(dtype)
                if bias is not None:
                    part_lse = torch.where(
                        bias[:, :, rows] == -math.inf, -math.inf, part_lse + bias[:, :, rows]
                    )
                this[:, :, rows] = part_lse
                higher = torch.maximum(top[:, :, rows], part_lse)
                old, new = (_ratio(x, higher)[..., None] for x in (top[:, :, rows], part_lse))
                top[:, :, rows], total[:, :, rows] = higher, total[:, :, rows] * old[..., 0] + new[..., 0]
                seen = new != 0
                if weight is not None:
                    w = weight[:, :, rows]
                    new, seen = new * w, seen & (w != 0)
                group_acc[:, :, rows] = group_acc[:, :, rows] * old + torch.where(
                    seen, new * part.to(dtype), 0
                )
                if group_sum is not None:
                    allowed = 1 if bias is None else (bias[:, :, rows, None] != -math.inf)
                    counted = allowed if weight is None else allowed * weight[:, :, rows]
                    sums = values.to(dtype).sum(2, keepdim=True).repeat_interleave(H // p.kv_heads, 1)
                    group_sum[:, :, rows] += torch.where(
                        torch.as_tensor(counted != 0, device=device), counted * sums, 0
                    )
                    count[:, :, rows] += n * allowed
            segment_lse.append((this, c))
        empty = total == 0
        total = torch.where(empty, 1, total)
        group_acc /= total[..., None]
        if (contrast := p.contrast[g]) is not None:
            assert group_sum is not None
            group_acc = contrast.beta * group_acc + (1 - contrast.beta) / count.clamp(min=1) * group_sum
        acc += group_acc if gate is None else group_acc * gate[..., g, None]
        lse[..., g] = torch.where(empty, -math.inf, top + torch.log(total)) + (0 if shift is None else shift)
        for this, c in segment_lse if p.need_mass else ():
            share = _ratio(this, top) / total
            for r in range(R):
                mass[:, :, r, c] = share[:, :, starts[r] : starts[r + 1]].sum(-1)

    gain = total_gain(p, mass)
    if p.gain is not None or p.head_gain is not None:
        acc *= gain.to(dtype)[:, :, row_of, None]
    return acc.transpose(1, 2).to(p.q.dtype), lse, mass, gain


def _mask_shift(p: Problem, g: int, dtype: torch.dtype) -> Tensor | None:
    """Each row's largest number of an additive mask in group g, (1|B, 1|H, 1|M), to subtract from the mask.

    A row of -1e9 then keeps the digits of its logits.
    """
    if p.mask is None or p.mask.dtype == torch.bool or g not in p.groups:
        return None
    mask = p.mask.reshape((1,) * (4 - p.mask.dim()) + p.mask.shape).to(dtype)
    if mask.shape[3] > 1:
        parts = zip(mask.split(p.key_lengths, 3), p.groups, strict=True)
        mask = torch.cat([part for part, group in parts if group == g], 3)
    if mask.shape[3] == 0:
        return None
    top = mask.amax(3)
    return torch.where(top.isfinite(), top, 0)


def _segment(p: Problem, c: int, n: int, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The first n keys and values of segment c, (B, Hkv, n, D), and its columns of the additive mask, less
    the shift.
    """
    i, start = p.key_location(c)

    def take(t: Tensor, source: Tensor | None) -> Tensor:
        t = t[:, start : start + n]
        t = t.expand(p.batch, *t.shape[1:]) if source is None else t[source[i]]
        return t.transpose(1, 2)

    keys, values, mask = take(p.k[i], p.source_k), take(p.v[i], p.source_v), None
    if p.mask is not None:
        first = sum(p.key_lengths[:c])
        mask = p.mask.reshape((1,) * (4 - p.mask.dim()) + p.mask.shape)
        mask = mask if mask.shape[3] == 1 else mask[..., first : first + n]
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf)
        mask = (mask if shift is None else mask.to(shift.dtype) - shift[..., None]).to(p.q.dtype)
    if p.valid is not None:
        alive = torch.arange(n, device=p.q.device) < p.valid[:, c, None]  # (B, n)
        keys, values = (torch.where(alive[:, None, :, None], t, 0) for t in (keys, values))
        cut = torch.where(alive, 0.0, -math.inf).to(p.q.dtype)[:, None, None, :]
        mask = cut if mask is None else mask + cut
    return keys, values, mask


def _runs(p: Problem, c: int) -> list[tuple[int, int]]:
    """Maximal runs [first, last) of non-empty row segments that see key segment c."""
    runs: list[tuple[int, int]] = []
    for r, length in enumerate(p.row_lengths):
        if not length or p.removed(r, c):
            continue
        if runs and all(p.row_lengths[i] == 0 for i in range(runs[-1][1], r)):
            runs[-1] = (runs[-1][0], r + 1)
        else:
            runs.append((r, r + 1))
    return runs


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole), 0 where there is no key at all."""
    return torch.where(part == -math.inf, 0, torch.exp(part - whole))

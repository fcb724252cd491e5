"""Join neighbouring segments to which the same entries apply, so that kernels see fewer and longer segments.

A text prompt of 77 one-token segments would be 77 tiles of padding. Segments stay apart where a statistic, a
gain or a group tells them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .control import GainRule
from .problem import DIMS, Problem

Indices = tuple[int, ...]
# (table, its dimension of row segments, its dimension of key segments; -1: none)
_TABLES = tuple((name, d.find("R"), d.find("C")) for name, d in DIMS.items() if set(d) & {"R", "C"})


def coalesce(problem: Problem) -> Problem:
    """The same problem with fewer segments. No table is read: values never change what is launched."""
    p = problem
    if p.row_items is not None or p.key_items is not None or p.need_stats:
        return p
    rule = p.head_gain
    joined = _join(
        p.row_lengths,
        p.key_lengths,
        p.groups,
        p.pair_ids,
        (rule.rows, rule.keys, rule.apply) if rule else ((), (), ()),
        p.gain is None,
        p.valid is None and len(p.k) == 1,
    )
    if joined is None:
        return p

    # The index tensors are cached: making one would copy to the device, for which a GPU would have to wait.
    device = p.q.device
    first_rows = None if len(joined.rows) == len(p.row_lengths) else _index(joined.rows, device)
    first_keys = None if len(joined.keys) == len(p.key_lengths) else _index(joined.keys, device)
    tables: dict[str, Tensor] = {}
    for name, row_dim, key_dim in _TABLES:
        table = getattr(p, name)
        if table is None:
            continue
        if first_rows is not None and row_dim >= 0:
            table = tables[name] = table.index_select(row_dim, first_rows)
        if first_keys is not None and key_dim >= 0:
            tables[name] = table.index_select(key_dim, first_keys)
    return p.changed(
        row_lengths=joined.row_lengths,
        key_lengths=joined.key_lengths,
        groups=joined.groups,
        pair_ids=joined.pair_ids,
        head_gain=GainRule(*joined.rule, norm=rule.norm) if rule else None,
        **tables,
    )


class _Joined(NamedTuple):
    rows: Indices  # the first segment of each run, whose table entries stand for it
    keys: Indices
    row_lengths: Indices
    key_lengths: Indices
    groups: Indices
    pair_ids: Indices
    rule: tuple[Indices, Indices, Indices]


@functools.lru_cache(1024)
def _join(
    row_lengths: Indices,
    key_lengths: Indices,
    groups: Indices,
    pair_ids: Indices,
    rule: tuple[Indices, Indices, Indices],
    rows_may: bool,
    keys_may: bool,
) -> _Joined | None:
    R, C = len(row_lengths), len(key_lengths)
    counted, mass_keys, scaled = map(frozenset, rule)

    def row_identity(r: int) -> tuple:
        return pair_ids[r * C : (r + 1) * C], r in counted, r in scaled

    def key_identity(c: int) -> tuple:
        return pair_ids[c::C], groups[c], c in mass_keys

    rows = _runs(R, row_identity, rows_may)
    keys = _runs(C, key_identity, keys_may)
    if len(rows) == R and len(keys) == C:
        return None
    first_rows, first_keys = tuple(run[0] for run in rows), tuple(run[0] for run in keys)

    def new(old: Indices, runs: list[list[int]]) -> Indices:
        return tuple(n for n, run in enumerate(runs) if not set(old).isdisjoint(run))

    return _Joined(
        rows=first_rows,
        keys=first_keys,
        row_lengths=tuple(sum(row_lengths[r] for r in run) for run in rows),
        key_lengths=tuple(sum(key_lengths[c] for c in run) for run in keys),
        groups=tuple(groups[c] for c in first_keys),
        pair_ids=tuple(pair_ids[r * C + c] for r in first_rows for c in first_keys),
        rule=(new(rule[0], rows), new(rule[1], keys), new(rule[2], rows)),
    )


@functools.lru_cache(1024)
def _index(indices: Indices, device: torch.device) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=device)


def _runs(count: int, identity: Callable[[int], tuple], may: bool) -> list[list[int]]:
    """Neighbours of equal identity."""
    runs: list[list[int]] = []
    for i in range(count):
        if may and runs and identity(runs[-1][0]) == identity(i):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs

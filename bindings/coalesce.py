"""Joining neighbouring segments to which the same entries apply, where no statistic tells them apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem

Indices = tuple[int, ...]


def coalesce(problem: Problem) -> Problem:
    """The same problem with fewer segments. No table is read, so that values never change what is launched."""
    p = problem
    if p.row_items is not None or p.key_items is not None or p.need_stats:
        return p
    rule = p.head_gain
    joined = _join(
        p.row_lengths, p.key_lengths, p.groups, p.kinds, (rule.rows, rule.keys, rule.apply) if rule else ((), (), ()),
        p.gain is None, p.valid is None and len(p.k) == 1,
    )  # fmt: skip
    if joined is None:
        return p

    def pick(table: Tensor | None) -> Tensor | None:
        return None if table is None else table.index_select(2, rows).index_select(3, keys)

    # Index tensors are kept, so that a call makes no copy to the device, which a GPU would have to wait for.
    rows, keys = _index(joined.rows, p.q.device), _index(joined.keys, p.q.device)

    return replace(
        p, row_lengths=joined.row_lengths, key_lengths=joined.key_lengths, groups=joined.groups, kinds=joined.kinds,
        bias=pick(p.bias), weight=pick(p.weight), gain=None if p.gain is None else p.gain.index_select(2, rows),
        valid=None if p.valid is None else p.valid.index_select(1, keys),
        head_gain=replace(rule, rows=joined.rule[0], keys=joined.rule[1], apply=joined.rule[2]) if rule else None,
    )  # fmt: skip


class _Joined(NamedTuple):
    rows: Indices  # the first segment of each run, whose table entries stand for it
    keys: Indices
    row_lengths: Indices
    key_lengths: Indices
    groups: Indices
    kinds: Indices
    rule: tuple[Indices, Indices, Indices]


@functools.lru_cache(1024)
def _join(
    row_lengths: Indices,
    key_lengths: Indices,
    groups: Indices,
    kinds: Indices,
    rule: tuple[Indices, Indices, Indices],
    rows_may: bool,
    keys_may: bool,
) -> _Joined | None:
    R, C = len(row_lengths), len(key_lengths)
    counted, mass_keys, scaled = map(frozenset, rule)

    def row_identity(r: int) -> tuple:
        return kinds[r * C : (r + 1) * C], r in counted, r in scaled

    def key_identity(c: int) -> tuple:
        return kinds[c::C], groups[c], c in mass_keys

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
        kinds=tuple(kinds[r * C + c] for r in first_rows for c in first_keys),
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

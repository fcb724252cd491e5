"""Problem: one attention call, checked and lowered to tensors and static structure. Every backend takes it.

The fields of `Problem` are the only list of the operator's inputs. From their declarations come the schema of
the registered operators, the order in which a problem is packed for them and unpacked again, the subset that
decides the attention map (which column_mass takes), and the dimensions by which segments are joined and items
are taken out. docs/architecture.md shows how a field is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .control import NORMS, Contrast, GainRule


def _input(
    schema: str,
    *,
    in_map: bool = False,
    dims: str = "",
    only: Sequence[str] = (),
    noun: str = "",
    **default: Any,
) -> Any:
    """Declare a field that the registered operators take.

    Args:
        schema: its type in an operator's schema.
        in_map: whether the probabilities p depend on it.
        dims: of a table, one letter a dimension: B items, H heads, M rows, R row segments, C key segments,
            G groups.
        only: the backends that take it, where not all do; the planner refuses the others.
        noun: what the field is called in such a refusal.
    """
    about = {"schema": schema, "in_map": in_map, "dims": dims, "only": tuple(only), "noun": noun}
    return field(metadata=about, **default)


@dataclass(eq=False, kw_only=True)
class Problem:
    """B output items, H heads, M rows in R segments, N keys in C segments and G softmax groups, head dim D.

    Treat as immutable. Not `frozen=True`, which makes a construction slower
    (benchmarks/results/overheads.json).

    A table's entry [b, h] is read at [b or 0, h or 0] where that dimension is 1. Key segment c lies in the
    only tensor, after the segments before it, or is tensor c of a list.
    """

    q: Tensor = _input("Tensor", in_map=True)  # (batch, M, H, D)
    # One tensor (batch | 1, N, Hkv, D), or C of them (batch | 1, key_lengths[c], Hkv, D).
    k: tuple[Tensor, ...] = _input("Tensor[]", in_map=True)
    v: tuple[Tensor, ...] = _input("Tensor[]")
    row_lengths: tuple[int, ...] = _input("SymInt[]", in_map=True)  # (R,) tokens
    key_lengths: tuple[int, ...] = _input("SymInt[]", in_map=True)  # (C,) tokens
    groups: tuple[int, ...] = _input("int[]", in_map=True)  # (C,) softmax group of each key segment
    # (R * C,) -1: the pair is removed; 0: no entry applies; equal numbers: the same entries apply.
    pair_ids: tuple[int, ...] = _input("int[]", in_map=True)
    contrast: tuple[Contrast | None, ...] = _input("int[]")  # (G,)
    # (G, 3) float64 on the CPU: beta, lo, hi. They travel as a tensor so that a changed number does not
    # recompile.
    contrast_values: Tensor | None = _input("Tensor?", default=None)
    scale: float = _input("float", in_map=True)
    scales: Tensor | None = _input(
        "Tensor?", in_map=True, dims="BH", default=None
    )  # float32, in place of scale
    # int32, where segment lengths differ from item to item
    row_items: Tensor | None = _input("Tensor?", in_map=True, dims="BR", default=None)
    key_items: Tensor | None = _input("Tensor?", in_map=True, dims="BC", default=None)
    # int32, the number of a segment's keys that exist; EVERY cuts nothing
    valid: Tensor | None = _input("Tensor?", in_map=True, dims="BC", default=None)
    bias: Tensor | None = _input("Tensor?", in_map=True, dims="BHRC", default=None)  # float32, -inf removes
    weight: Tensor | None = _input("Tensor?", dims="BHRC", default=None)  # float32
    gain: Tensor | None = _input("Tensor?", dims="BHR", default=None)  # float32
    gates: Tensor | None = _input("Tensor?", dims="BMG", default=None)  # float32
    head_gain: GainRule | None = _input("int[]", default=None)
    head_gain_values: Tensor | None = _input("Tensor?", default=None)  # (2,) float32: span, floor
    source_q: Tensor | None = _input(
        "Tensor?", in_map=True, default=None
    )  # (B,) int64: b reads q[source_q[b]]
    source_k: Tensor | None = _input("Tensor?", in_map=True, default=None)  # (len(k), B) int64
    source_v: Tensor | None = _input("Tensor?", default=None)  # (len(v), B) int64
    # bool or float, broadcastable to (B, H, M, N)
    mask: Tensor | None = _input("Tensor?", only=("composed", "reference"), noun="a dense mask", default=None)

    batch: int  # B
    need_stats: bool = False  # lse, mass and gain are returned to the caller
    out: Tensor | None = None  # (B, M, H, D) to write to, in place of a new tensor

    def changed(self, **values: Any) -> Problem:
        """This problem with other values of some fields; faster than dataclasses.replace."""
        new = object.__new__(Problem)
        new.__dict__.update(self.__dict__, **values)
        return new

    @property
    def rows(self) -> int:
        return self.q.shape[1]

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k[0].shape[2]

    @property
    def dim(self) -> int:
        return self.q.shape[3]

    @property
    def keys(self) -> int:
        return sum(t.shape[1] for t in self.k)

    @property
    def n_groups(self) -> int:
        return len(self.contrast)

    @property
    def need_mass(self) -> bool:
        return self.need_stats or self.head_gain is not None

    def row_starts(self) -> tuple[int, ...]:
        """First row of each row segment, where all items agree."""
        return tuple(accumulate(self.row_lengths, initial=0))[:-1]

    def key_location(self, c: int) -> tuple[int, int]:
        """(index of the tensor, first key in it) of key segment c, where all items agree."""
        return (c, 0) if len(self.k) > 1 else (0, sum(self.key_lengths[:c]))

    def removed(self, r: int, c: int) -> bool:
        """Whether the pair is removed for every item and head, known without reading a table."""
        return self.pair_ids[r * len(self.key_lengths) + c] < 0

    def item_scale(self) -> Tensor:
        """(1|B, 1|H, 1, 1) float64"""
        if self.scales is None:
            return torch.full((1, 1, 1, 1), self.scale, dtype=torch.float64, device=self.q.device)
        return self.scales.double()[:, :, None, None]


def default_scale(dim: int) -> float:
    return 1.0 / math.sqrt(dim)


# The registered operators' view of a problem

_INPUTS = {f.name: f.metadata for f in fields(Problem) if "schema" in f.metadata}
MAP = tuple(name for name, about in _INPUTS.items() if about["in_map"])
"""The inputs that decide the probabilities p."""
DIMS = {name: about["dims"] for name, about in _INPUTS.items() if about["dims"]}
"""{table: its dimensions, one letter each}"""
ONLY = tuple((name, about["only"], about["noun"]) for name, about in _INPUTS.items() if about["only"])
"""(field, the backends that take it, what it is called) of each field that not all backends take."""


def schema(names: Iterable[str] = tuple(_INPUTS)) -> str:
    """The inputs as a part of an operator's schema, in the order in which pack() gives them."""
    return ", ".join(f"{_INPUTS[name]['schema']} {name}" for name in names)


def position(name: str) -> int:
    """Where pack() puts a field."""
    return tuple(_INPUTS).index(name)


def pack(p: Problem, names: Iterable[str] = tuple(_INPUTS)) -> tuple:
    """The fields as an operator's inputs, in the order of schema()."""
    encoded = {"contrast": _contrast_kinds, "head_gain": _flat_gain_rule}
    values = (encoded[name](getattr(p, name)) if name in encoded else getattr(p, name) for name in names)
    return tuple(list(value) if isinstance(value, tuple) else value for value in values)


def unpack(inputs: Sequence, names: Iterable[str] = tuple(_INPUTS), **more: Any) -> Problem:
    """The problem that pack() made these inputs of. more: fields that are not among `names`."""
    given = dict(zip(names, inputs, strict=True))
    values: dict[str, Any] = {
        name: tuple(x) if isinstance(x, (list, tuple)) else x for name, x in given.items()
    }
    if "contrast" in values:
        values["contrast"] = _contrasts(values["contrast"], values["contrast_values"])
    if "head_gain" in values:
        values["head_gain"] = _gain_rule(values["head_gain"])
    source_q = values["source_q"]
    values["batch"] = (values["q"] if source_q is None else source_q).shape[0]
    return Problem(**values | more)


def _contrast_kinds(contrast: tuple[Contrast | None, ...]) -> list[int]:
    """(groups,) 0 none, 1 without clip, 2 with clip"""
    return [0 if c is None else 1 if c.clip is None else 2 for c in contrast]


def _contrasts(kinds: Sequence[int], values: Tensor | None) -> tuple[Contrast | None, ...]:
    """values (groups, 3): beta, lo, hi, on the CPU, where reading them does not wait for a device."""
    if values is None:
        return (None,) * len(kinds)
    rows = zip(kinds, values.tolist(), strict=True)
    return tuple(
        None if k == 0 else Contrast(beta, (lo, hi) if k == 2 else None) for k, (beta, lo, hi) in rows
    )


def _flat_gain_rule(rule: GainRule | None) -> list[int]:
    """norm, the three counts, then the indices; empty: no rule"""
    if rule is None:
        return []
    parts = (rule.rows, rule.keys, rule.apply)
    return [NORMS.index(rule.norm), *map(len, parts), *(i for part in parts for i in part)]


def _gain_rule(flat: Sequence[int]) -> GainRule | None:
    if not flat:
        return None
    norm, n_rows, n_keys, _ = flat[:4]
    rest = tuple(flat[4:])
    return GainRule(rest[:n_rows], rest[n_rows : n_rows + n_keys], rest[n_rows + n_keys :], NORMS[norm])

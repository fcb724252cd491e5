"""compose(): several methods on one model, as one method whose plans are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ....bindings import Contrast, Control, HeadGain, Segments
from .fields import Extra
from .layer import Layer, Step
from .model_hooks import Attachment
from .plan import LatePlan, Method, Plan


def compose(*methods: Method) -> Composition:
    """Several methods as one method.

    In each layer and step the plans are joined from left to right:

    * tables: the tokens are cut where a segment of either method ends. On each piece biases add up; weights,
      gains and gates multiply. Softmax groups that one method makes of the layer's keys are kept. Extra keys
      join the softmax group that they share with the layer's keys, or are a group of their own;
    * parts: if one method puts an item into a part, only that method acts on it; the other methods act on the
      remaining items;
    * offsets add up; `query`, `value` and `hidden` are applied one after the other; every `see` is called.

    Args:
        methods: objects with plan(layer, step), at least one.

    Returns:
        A method for apply().

    Raises:
        TypeError: no method.
        ValueError: when the model is called, where two plans cannot be joined; names the methods, the layer
            and the reason.

    Examples:
        >>> from flashbrush.integrations import InContextBrush, PerturbedAttention
        >>> from flashbrush.integrations.diffusers import compose
        >>> both = compose(InContextBrush(alpha_subject=0.5), PerturbedAttention(items=(1,)))
        >>> [type(method).__name__ for method in both.methods]
        ['InContextBrush', 'PerturbedAttention']
    """
    if not methods or any(isinstance(m, type) or not isinstance(m, Method) for m in methods):
        raise TypeError(f"methods: expected objects with plan(layer, step), got {methods!r}")
    return Composition(methods)


class Composition:
    """A method made of several; made by compose()."""

    def __init__(self, methods: tuple[Method, ...]) -> None:
        self.methods = methods
        # Plans are compared by identity. The same plans give the same joined plan, whose tables then stay on
        # the device.
        self._kept: dict[tuple[Plan, ...], Plan] = {}

    def plan(self, layer: Layer, step: Step) -> Plan | LatePlan | None:
        plans = [(type(method).__name__, method.plan(layer, step)) for method in self.methods]
        late = partial(self._joined, layer, plans)
        return late if any(callable(plan) for _, plan in plans) else late()

    def _joined(self, layer: Layer, plans: list[tuple[str, Plan | LatePlan | None]]) -> Plan | None:
        made = [(name, plan() if callable(plan) else plan) for name, plan in plans]
        given = [(name, plan) for name, plan in made if plan is not None]
        if len(given) < 2:
            return given[0][1] if given else None
        key = tuple(plan for _, plan in given)
        if key in self._kept:
            return self._kept[key]
        name, joined = given[0]
        for other, plan in given[1:]:
            try:
                joined = _join(joined, plan)
            except ValueError as error:
                raise ValueError(
                    f"compose: {name} and {other} cannot be joined in layer {layer.index} ({layer.kind}): "
                    f"{error}"
                ) from None
            name = f"{name} with {other}"
        if len(self._kept) >= 512:
            self._kept.clear()
        self._kept[key] = joined
        return joined

    def attach(self, model: nn.Module) -> list[Attachment]:
        attached: list[Attachment] = []
        try:
            for method in self.methods:
                attached.append(Attachment(method, model))
        except BaseException:  # one method refuses the model, or an interrupt: take the others' hooks out
            for attachment in attached:
                attachment.remove()
            raise
        return attached

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.methods))})"


def _join(a: Plan, b: Plan) -> Plan:
    for name in ("source", "scale"):
        if getattr(a, name) is not None and getattr(b, name) is not None:
            raise ValueError(f"both have a {name}")
    if taken := {n for part in a.parts for n in part.items} & {n for part in b.parts for n in part.items}:
        raise ValueError(f"both have parts for the items {sorted(taken)}")
    for one, other in ((a, b), (b, a)):
        if not one.parts:
            continue
        if other.order is not None:
            raise ValueError("one sorts the tokens of all items, the other has parts of the batch")
        if other.source is not None or isinstance(other.scale, Tensor):
            what = "a tensor as scale" if other.source is None else "a source"
            raise ValueError(f"one has parts of the batch, the other {what} for all of its items")
        if other.control is not None and other.control.batches and one.control is not other.control:
            raise ValueError("one has parts of the batch, the other tables for each of its items")
    control, order = _join_controls(a, b)
    extra = {**_renamed(a, {}), **_renamed(b, _renames(a, b))} or None
    return replace(
        a,
        control=control,
        order=order,
        extra=extra,
        source=b.source if a.source is None else a.source,
        scale=b.scale if a.scale is None else a.scale,
        q_offset=_sum(a.q_offset, b.q_offset),
        k_offset=_sum(a.k_offset, b.k_offset),
        query=_chain(a.query, b.query),
        value=_chain(a.value, b.value),
        hidden=_chain(a.hidden, b.hidden),
        see=_both(a.see, b.see),
        parts=(*a.parts, *b.parts),
    )


def _join_controls(a: Plan, b: Plan) -> tuple[Control | None, Tensor | None]:
    order = a.order if b.order is None else b.order
    if a.control is None or b.control is None:
        return a.control if b.control is None else b.control, order
    if (
        a.order is not None
        and b.order is not None
        and not (a.order is b.order or torch.equal(a.order, b.order))
    ):
        raise ValueError("each sorts the tokens in its own way")
    names = _renames(a, b)
    tables = []
    for plan, renames in ((a, {}), (b, names)):
        control = plan.control
        assert control is not None
        table = _Tables(control, plan.extra or {}, renames)
        if order is not None and plan.order is None:
            table.sort(order)
        tables.append(table)
    return _join_tables(*tables), order


def _renames(a: Plan, b: Plan) -> dict[str, str]:
    """{name: new name} of b's extra keys whose name a's control has too."""
    taken = set(a.control.keys.names if a.control is not None else ())
    if a.control is None or b.control is None:
        return {}
    new: dict[str, str] = {}
    for name in b.extra or {}:
        fresh, n = name, 2
        while fresh in taken:
            fresh, n = f"{name}_{n}", n + 1
        taken.add(fresh)
        new[name] = fresh
    return new


def _renamed(plan: Plan, names: Mapping[str, str]) -> Extra:
    return {names.get(name, name): pair for name, pair in (plan.extra or {}).items()}


class _Tables:
    """A control's tables, its key segments divided into the layer's own and extra ones."""

    def __init__(self, control: Control, extra: Extra, names: Mapping[str, str]) -> None:
        if any(segments.items is not None for segments in (control.rows, control.keys)):
            raise ValueError("one has segments whose lengths differ from item to item")
        self.control, self.gates = control, control.gates
        self.rows = list(zip(control.rows.names, control.rows.lengths, strict=True))
        positions = range(len(control.keys))
        self.own = [c for c in positions if control.keys.names[c] not in extra]
        self.extra = [c for c in positions if control.keys.names[c] in extra]
        self.names = [names.get(name, name) for name in control.keys.names]
        self.own_groups = sorted({control.groups[c] for c in self.own})

    def sort(self, order: Tensor) -> None:
        """Bring gates into the other control's order of tokens."""
        if len(self.rows) > 1 or len(self.own) > 1:
            raise ValueError("one sorts the tokens, the other has segments of them in the layer's order")
        if self.gates is not None and self.gates.shape[1] > 1:
            index = (order if order.dim() == 2 else order[None]).to(self.gates.device)
            gates = self.gates.expand(max(index.shape[0], self.gates.shape[0]), -1, -1)
            self.gates = torch.stack(
                [g[i] for g, i in zip(gates, index.expand(gates.shape[0], -1), strict=True)]
            )

    def at(self, table: str, r: int, c: int | None) -> Tensor | None:
        """The table's entry (1 or batch, 1 or heads) of a pair of segments; None: neutral."""
        values = getattr(self.control, table)
        return None if values is None or c is None else values[:, :, r, c]

    def gate(self, group: int) -> Tensor | None:
        """(1 or batch, 1 or rows); None: 1."""
        return None if self.gates is None else self.gates[:, :, group]


def _join_tables(a: _Tables, b: _Tables) -> Control:
    rows = _refine(a.rows, b.rows)
    row_names = _names([(a.rows[i][0], b.rows[j][0]) for i, j, _ in rows], len(a.rows), len(b.rows))
    lengths = [[(t.names[c], t.control.keys.lengths[c]) for c in t.own] for t in (a, b)]
    own = _refine(*lengths)
    pairs: list[tuple[int | None, int | None, int]] = [(a.own[i], b.own[j], n) for i, j, n in own]
    key_names = _names([(a.names[a.own[i]], b.names[b.own[j]]) for i, j, _ in own], len(a.own), len(b.own))
    pairs += [(c, None, a.control.keys.lengths[c]) for c in a.extra] + [
        (None, c, b.control.keys.lengths[c]) for c in b.extra
    ]
    key_names += [a.names[c] for c in a.extra] + [b.names[c] for c in b.extra]
    bias, weight = {}, {}
    for (i, j, _), row in zip(rows, row_names, strict=True):
        for (c, d, _), key in zip(pairs, key_names, strict=True):
            for entries, table, neutral in ((bias, "bias", 0.0), (weight, "weight", 1.0)):
                values = [x for x in (a.at(table, i, c), b.at(table, j, d)) if x is not None]
                if values:
                    total = (
                        values[0]
                        if len(values) == 1
                        else values[0] + values[1]
                        if neutral == 0
                        else values[0] * values[1]
                    )
                    if (value := _number(total)) is None or value != neutral:
                        entries[row, key] = total if value is None else value
    groups, gates, contrast = _groups(a, b, pairs, key_names)
    gain = {}
    for (i, j, _), row in zip(rows, row_names, strict=True):
        values = [t.control.gain[:, :, n] for t, n in ((a, i), (b, j)) if t.control.gain is not None]
        if values:
            gain[row] = values[0] if len(values) == 1 else values[0] * values[1]
    valid = {}
    for t, which in ((a, 0), (b, 1)):
        if t.control.valid is None:
            continue
        for pair, key in zip(pairs, key_names, strict=True):
            c = pair[which]
            if c is None:
                continue
            if pair[2] != t.control.keys.lengths[c]:
                raise ValueError("one cuts off the end of a key segment that the other splits")
            count = t.control.valid[:, c].clamp(max=pair[2])
            valid[key] = torch.minimum(valid[key], count) if key in valid else count
    sizes = [
        {name: n for name, (*_, n) in zip(names, of, strict=True)}
        for names, of in ((row_names, rows), (key_names, pairs))
    ]
    return Control(
        Segments(sizes[0]),
        Segments(sizes[1]),
        bias=bias,
        weight=weight,
        gain=gain,
        groups=groups,
        gates=gates,
        head_gain=_head_gain(a, b, rows, row_names, pairs, key_names),
        contrast=contrast,
        valid=valid,
    )


def _head_gain(
    a: _Tables, b: _Tables, rows: list, row_names: list[str], pairs: list, key_names: list[str]
) -> HeadGain | None:
    """The derived gain of the one method that has one, with its segments' new names."""
    with_gain = [(t, which) for which, t in enumerate((a, b)) if t.control.head_gain is not None]
    if len(with_gain) > 1:
        raise ValueError("both derive a gain of the heads")
    for t, which in with_gain:
        rule = t.control.gain_rule
        assert t.control.head_gain is not None and rule is not None
        new = [
            [name for name, parts in zip(names, of, strict=True) if parts[which] in wanted]
            for names, of, wanted in (
                (row_names, rows, rule.rows),
                (key_names, pairs, rule.keys),
                (row_names, rows, rule.apply),
            )
        ]
        if not all(new):
            raise ValueError("one derives a gain of the heads from segments without tokens")
        return replace(t.control.head_gain, rows=new[0], keys=new[1], apply_to=new[2])
    return None


def _groups(
    a: _Tables, b: _Tables, pairs: list[tuple[int | None, int | None, int]], names: list[str]
) -> tuple[dict[str, list[str]], dict[str, Tensor | float], dict[str, Contrast]]:
    """The softmax groups of both, their gates and contrasts."""
    if len(a.own_groups) > 1 and len(b.own_groups) > 1:
        raise ValueError("both split the layer's keys into softmax groups")
    groups: dict[str, list[str]] = {}
    of: dict[tuple[int | None, int | None], str] = {}
    for (c, d, _), key in zip(pairs, names, strict=True):
        g = None if c is None else a.control.groups[c]
        h = None if d is None else b.control.groups[d]
        # Extra keys can join the softmax of the layer's keys only if the other control does not split it.
        for shared, mine, other in ((g, a, b), (h, b, a)):
            if (c is None or d is None) and shared in mine.own_groups and len(other.own_groups) > 1:
                raise ValueError("one adds keys to the softmax that the other splits into groups")
        if c is None and h in b.own_groups:
            g = a.own_groups[0]
        if d is None and g in a.own_groups:
            h = b.own_groups[0]
        if (g, h) not in of:
            wanted = _group_name(a, g, b, h)
            fresh, n = wanted, 2
            while fresh in groups:
                fresh, n = f"{wanted}_{n}", n + 1
            of[g, h], groups[fresh] = fresh, []
        groups[of[g, h]].append(key)
    gates: dict[str, Tensor | float] = {}
    contrast: dict[str, Contrast] = {}
    for (g, h), name in of.items():
        found = [t.gate(n) for t, n in ((a, g), (b, h)) if n is not None]
        given = [gate for gate in found if gate is not None]
        if given:
            gate = given[0] if len(given) == 1 else given[0] * given[1]
            number = _number(gate)
            gates[name] = gate.expand(-1, a.control.rows.total) if number is None else number
        both = [t.control.contrast[n] for t, n in ((a, g), (b, h)) if n is not None]
        kinds = [c for c in both if c is not None]
        if len(kinds) > 1:
            raise ValueError("both contrast the same softmax")
        if kinds:
            contrast[name] = kinds[0]
    return groups, gates, contrast


def _group_name(a: _Tables, g: int | None, b: _Tables, h: int | None) -> str:
    if g is None or (h is not None and len(b.own_groups) > 1):
        assert h is not None
        return b.control.group_names[h]
    return a.control.group_names[g]


def _refine(a: list[tuple[str, int]], b: list[tuple[str, int]]) -> list[tuple[int, int, int]]:
    """The common refinement of two segmentations: (index in a, index in b, length) of each piece."""
    if sum(n for _, n in a) != sum(n for _, n in b):
        raise ValueError(f"their tables are for {sum(n for _, n in a)} and {sum(n for _, n in b)} tokens")
    out, i, j = [], 0, 0
    ends = [list(accumulate(n for _, n in segments)) for segments in (a, b)]
    for start, end in pairwise(sorted({0, *ends[0], *ends[1]})):
        while ends[0][i] <= start:
            i += 1
        while ends[1][j] <= start:
            j += 1
        out.append((i, j, end - start))
    return out


def _names(pairs: list[tuple[str, str]], in_a: int, in_b: int) -> list[str]:
    """Names of the pieces: those of the control with several segments, or "a+b" where both have several."""
    if in_b == 1:
        return [name for name, _ in pairs]
    return [other if in_a == 1 else name if name == other else f"{name}+{other}" for name, other in pairs]


def _number(value: Tensor) -> float | None:
    """The number, where all entries are equal and it can be read without waiting for a GPU."""
    if value.device.type != "cpu" or not bool((value == value.flatten()[0]).all()):
        return None
    return float(value.flatten()[0])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _chain(first: Callable | None, second: Callable | None) -> Callable | None:
    if first is None or second is None:
        return second if first is None else first
    return lambda x: second(first(x))


def _both(first: Callable | None, second: Callable | None) -> Callable | None:
    if first is None or second is None:
        return second if first is None else first

    def see(seen: Any) -> None:
        first(seen)
        second(seen)

    return see

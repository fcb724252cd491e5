"""Control: what is done to an attention, as small tables over (row segment, key segment) pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .segments import INT_DTYPES, Segments

Value = float | Tensor
NORMS = ("minmax", "mean", "max", "softmax")
_TABLES = (
    "bias",
    "weight",
    "gain",
    "head_gain_values",
    "gates",
    "valid",
)  # tensors that move with the device
EVERY = 2**31 - 1  # an entry of the `valid` table that cuts nothing


@dataclass(frozen=True)
class HeadGain:
    """A gain per head, derived from the attention mass of the block (`rows`, `keys`).

    With m[b, h] the block's mass divided by its number of rows, and min, max, mean and softmax over the
    heads:

        minmax    floor + span * (m - min) / (max - min + eps)        eps of float32
        mean      floor + span * m / mean
        max       floor + span * m / max
        softmax   floor + span * H * softmax(m)

    In-Context Brush (arXiv 2505.20271, Eqs. 6-8), whose code uses minmax.

    Args:
        rows: row segments of the block: a name, a sequence of names, or "*" for all.
        keys: key segments of the block, as rows.
        span: a finite number.
        floor: a finite number.
        norm: "minmax", "mean", "max" or "softmax".
        apply_to: the row segments that the gain multiplies, as rows.

    Raises:
        ValueError: an unknown norm, a span or floor that is not finite.

    Examples:
        >>> import flashbrush as fb
        >>> segments = fb.Segments(prompt=4, target=8)
        >>> fb.Control(segments, head_gain=fb.HeadGain(rows="target", keys="prompt", span=0.2)).head_gain.norm
        'minmax'
    """

    rows: str | Sequence[str] = "target"
    keys: str | Sequence[str] = "prompt"
    span: float = 0.2
    floor: float = 1.0
    norm: Literal["minmax", "mean", "max", "softmax"] = "minmax"
    apply_to: str | Sequence[str] = "*"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"HeadGain.norm: expected one of {', '.join(NORMS)}, got {self.norm!r}")
        for name in ("span", "floor"):
            if not _is_number(value := getattr(self, name)) or not fits_float32(value):
                raise ValueError(f"HeadGain.{name}: expected a finite number, got {value!r}")


@dataclass(frozen=True)
class GainRule:
    """The static part of a HeadGain: its segments as indices, and its norm."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    apply: tuple[int, ...]
    norm: str


@dataclass(frozen=True)
class Contrast:
    """Contrast of the attention map: p becomes clip(beta*p - (beta-1)/Nk, lo, hi) on allowed keys.

    Nk counts the allowed, valid keys of the row's softmax group. SD-VICL (arXiv 2508.09949) and cross-image
    attention (arXiv 2311.03335) have beta 1.67 and clip (0, 1).

    Args:
        beta: a finite number; 1 changes nothing but the clip.
        clip: (lo, hi), or None: unclipped, which is linear and takes one pass over the keys instead of two.

    Raises:
        ValueError: beta is not a finite number; clip is neither None nor a pair (lo, hi) with lo <= hi.

    Examples:
        >>> import flashbrush as fb
        >>> fb.Control(fb.Segments(tokens=16), contrast=fb.Contrast(1.67, clip=None)).contrast
        (Contrast(beta=1.67, clip=None),)
    """

    beta: float = 1.67
    clip: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not _is_number(self.beta) or not fits_float32(self.beta):
            raise ValueError(f"Contrast.beta: expected a finite number, got {self.beta!r}")
        if self.clip is None:
            return
        bounds = tuple(self.clip) if isinstance(self.clip, (tuple, list)) else ()
        if (
            len(bounds) != 2
            or not all(_is_number(x) and fits_float32(x) for x in bounds)
            or bounds[0] > bounds[1]
        ):
            raise ValueError(
                f"Contrast.clip: expected None or finite bounds (lo, hi) with lo <= hi, got {self.clip!r}"
            )
        object.__setattr__(self, "clip", bounds)


class Control:
    """What an attention does beyond softmax(QK^T)V, constant on each (row segment, key segment) pair.

    Args:
        rows: Segments of the query rows.
        keys: Segments of the keys. None: the same as rows.
        bias: {(row segment, key segment): value}, added to the logits before the softmax, natural units. -inf
            removes the pair: its keys are never read. Other values are within 1e4. A value is a number or a
            float tensor (heads,) or (batch, heads); "*" matches every segment; later entries overwrite
            earlier ones.
        weight: {(row segment, key segment): value}, finite and >= 0: multiplies the probabilities after the
            softmax, which are not normalised again.
        gain: {row segment: value}: multiplies the output's rows.
        head_gain: a gain derived from the attention mass; it multiplies with `gain`.
        groups: {group: [key segments]}: softmax groups, each normalised alone. Every key segment is in
            exactly one. The dict's order is the order of lse's last dimension. None: one group named "all".
        gates: {group: value}: a number or a float tensor (batch, rows) that multiplies the group's output; 1
            where not named.
        contrast: a Contrast for all groups, or {group: Contrast}.
        valid: {key segment: int tensor (batch,)}: only the segment's first n keys exist for the item.

    Numbers and CPU tensors are checked by value, device tensors by shape and dtype only. The tables are made
    here, once. torch.compile sees them as tensors, so that a changed number does not recompile.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import flashbrush as fb
        >>> segments = fb.Segments(prompt=512, subject=2304, target=2304)
        >>> removed = float("-inf")
        >>> fb.Control(segments, weight={("target", "subject"): 1.3}, bias={("subject", "target"): removed})
        Control(rows=Segments(prompt=512, subject=2304, target=2304), bias=(1, 1, 3, 3), weight=(1, 1, 3, 3))
    """

    # Attributes that a Problem takes as they are, by the same names.
    LOWERED = (
        "groups",
        "pair_ids",
        "contrast",
        "contrast_values",
        "valid",
        "bias",
        "weight",
        "gain",
        "gates",
        "head_gain_values",
    )

    def __init__(
        self,
        rows: Segments,
        keys: Segments | None = None,
        *,
        bias: Mapping[tuple[str, str], Value] | None = None,
        weight: Mapping[tuple[str, str], Value] | None = None,
        gain: Mapping[str, Value] | None = None,
        head_gain: HeadGain | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        gates: Mapping[str, Value] | None = None,
        contrast: Contrast | Mapping[str, Contrast] | None = None,
        valid: Mapping[str, Tensor] | None = None,
    ) -> None:
        keys = rows if keys is None else keys
        for name, segments in (("rows", rows), ("keys", keys)):
            if not isinstance(segments, Segments):
                raise TypeError(f"{name}: expected Segments, got {type(segments).__name__}")
        self.rows, self.keys = rows, keys
        for name, entries in (
            ("bias", bias),
            ("weight", weight),
            ("gain", gain),
            ("gates", gates),
            ("valid", valid),
        ):
            if entries is not None and not isinstance(entries, Mapping):
                raise TypeError(f"{name}: expected a dict, got {type(entries).__name__}")
        self.group_names, self.groups = _lower_groups(groups, keys)
        entries_bias = [(pair, _check_value(f"bias[{pair}]", v, "bias")) for pair, v in (bias or {}).items()]
        entries_weight = [
            (pair, _check_value(f"weight[{pair}]", v, "weight")) for pair, v in (weight or {}).items()
        ]
        bias_ids, self.bias = self._pair_table("bias", entries_bias, 0.0)
        weight_ids, self.weight = self._pair_table("weight", entries_weight, 1.0)
        removed = [_is_minus_inf(v) for _, v in entries_bias]
        distinct: dict[tuple[int, int], int] = {(-1, -1): 0}
        pair_ids = []
        for b, w in zip(bias_ids, weight_ids, strict=True):
            pair_ids.append(-1 if b >= 0 and removed[b] else distinct.setdefault((b, w), len(distinct)))
        # Per pair: -1 removed, 0 untouched, else the same positive number where the same entries apply.
        self.pair_ids: tuple[int, ...] = tuple(pair_ids)
        self.gain = self._gain_table(gain or {})
        self.head_gain = head_gain
        self.gain_rule: GainRule | None = None
        self.head_gain_values: Tensor | None = None  # (2,) float32: span, floor
        if head_gain is not None:
            if not isinstance(head_gain, HeadGain):
                raise TypeError(f"head_gain: expected HeadGain, got {type(head_gain).__name__}")
            self.gain_rule = GainRule(
                segment_indices("head_gain.rows", head_gain.rows, rows),
                segment_indices("head_gain.keys", head_gain.keys, keys),
                segment_indices("head_gain.apply_to", head_gain.apply_to, rows),
                head_gain.norm,
            )
            self.head_gain_values = torch.tensor(
                [head_gain.span, head_gain.floor], dtype=torch.float32, device="cpu"
            )
        self.gates = self._gate_table(gates or {})
        self.contrast = _lower_contrast(contrast, self.group_names)
        # (groups, 3) float64: beta, lo, hi. On the CPU, where they can be read without waiting for a device.
        self.contrast_values: Tensor | None = None
        if any(c is not None for c in self.contrast):
            numbers = [
                (0.0, 0.0, 0.0) if c is None else (c.beta, *(c.clip or (0.0, 0.0))) for c in self.contrast
            ]
            self.contrast_values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self.valid = self._valid_table(valid or {})
        # The batch sizes and head counts that the tables have, for the check of every call; 1 broadcasts.
        tables = [t for t in (self.bias, self.weight, self.gain) if t is not None]
        broadcast = tables if self.gates is None else [*tables, self.gates]
        exact = [t for t in (self.valid, rows.items, keys.items) if t is not None]
        self.batches = frozenset(
            {t.shape[0] for t in broadcast if t.shape[0] > 1} | {t.shape[0] for t in exact}
        )
        self.heads = frozenset(t.shape[1] for t in tables if t.shape[1] > 1)
        self._devices = frozenset(
            t.device for t in (getattr(self, name) for name in _TABLES) if t is not None
        )
        self._moved: dict[torch.device, Control] = {}

    def _pair_table(
        self, argument: str, entries: list[tuple[tuple[str, str], Value]], neutral: float
    ) -> tuple[list[int], Tensor | None]:
        """(entry index per pair or -1, table (1|batch, 1|heads, rows, keys) or None)"""
        ids = [-1] * (len(self.rows) * len(self.keys))
        if not entries:
            return ids, None
        table = _blank([v for _, v in entries], (len(self.rows), len(self.keys)), neutral, argument)
        for position, (pair, value) in enumerate(entries):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"{argument}: a key must be a pair (row segment, key segment), got {pair!r}")
            for r in segment_indices(f"{argument}[{pair}] row", pair[0], self.rows):
                for c in segment_indices(f"{argument}[{pair}] key", pair[1], self.keys):
                    table[:, :, r, c] = _as_batch_heads(value)
                    ids[r * len(self.keys) + c] = position
        return ids, table

    def _gain_table(self, gain: Mapping[str, Value]) -> Tensor | None:
        """(1|batch, 1|heads, rows)"""
        if not gain:
            return None
        checked = {name: _check_value(f"gain[{name!r}]", value, "gain") for name, value in gain.items()}
        table = _blank(list(checked.values()), (len(self.rows),), 1.0, "gain")
        for name, value in checked.items():
            for r in segment_indices(f"gain[{name!r}]", name, self.rows):
                table[:, :, r] = _as_batch_heads(value)
        return table

    def _gate_table(self, gates: Mapping[str, Value]) -> Tensor | None:
        """(1|batch, 1|rows, groups)"""
        if not gates:
            return None
        shape, device = (1, 1), torch.device("cpu")
        for name, gate in gates.items():
            if name not in self.group_names:
                raise ValueError(
                    f"gates: unknown group {name!r}; expected one of {', '.join(self.group_names)}"
                )
            if not isinstance(gate, Tensor):
                _check_value(f"gates[{name!r}]", gate, "gain")
                continue
            _check_tensor(f"gates[{name!r}]", gate)
            if gate.dim() != 2 or gate.shape[1] != self.rows.total:
                raise ValueError(
                    f"gates[{name!r}]: expected a number or shape (batch, {self.rows.total} rows), "
                    f"got {tuple(gate.shape)}"
                )
            if _readable(gate) and not bool(torch.isfinite(gate).all()):
                raise ValueError(f"gates[{name!r}]: expected finite values, got others")
            if 1 not in (shape[0], gate.shape[0]) and shape[0] != gate.shape[0]:
                raise ValueError(f"gates: the batch sizes differ: {shape[0]} and {gate.shape[0]}")
            shape, device = (max(shape[0], gate.shape[0]), gate.shape[1]), gate.device
        table = torch.ones(*shape, len(self.group_names), dtype=torch.float32, device=device)
        for name, gate in gates.items():
            table[:, :, self.group_names.index(name)] = (
                gate.detach() if isinstance(gate, Tensor) else float(gate)
            )
        return table

    def _valid_table(self, valid: Mapping[str, Tensor]) -> Tensor | None:
        """(batch, key segments) int32, EVERY where a segment is not cut"""
        if not valid:
            return None
        columns: dict[int, Tensor] = {}
        for name, count in valid.items():
            c = self.keys.index(name, "valid")
            if not isinstance(count, Tensor) or count.dim() != 1 or count.dtype not in INT_DTYPES:
                got = (
                    f"{count.dtype} {tuple(count.shape)}"
                    if isinstance(count, Tensor)
                    else type(count).__name__
                )
                raise TypeError(f"valid[{name!r}]: expected an int tensor (batch,), got {got}")
            limit = self.keys.lengths[c] if self.keys.items is None else self.keys.items[:, c]
            if isinstance(limit, Tensor) and limit.shape != count.shape:
                raise ValueError(
                    f"valid[{name!r}]: expected shape {tuple(limit.shape)}, got {tuple(count.shape)}"
                )
            if _readable(count) and bool(((count < 0) | (count > limit)).any()):
                most = limit.tolist() if isinstance(limit, Tensor) else limit
                raise ValueError(f"valid[{name!r}]: expected values in 0..{most}, got {count.tolist()}")
            columns[c] = count
        sizes = {int(count.shape[0]) for count in columns.values()}
        if len(sizes) > 1:
            raise ValueError(f"valid: the batch sizes differ: {sorted(sizes)}")
        first = next(iter(columns.values()))
        table = torch.full((first.shape[0], len(self.keys)), EVERY, dtype=torch.int32, device=first.device)
        for c, count in columns.items():
            table[:, c] = count
        return table

    def to(self, device: torch.device | str) -> Control:
        """This control with its tables on `device`: itself if they are there already, else a cached copy."""
        device = torch.device(device)
        if self._devices <= {device}:
            return self
        if device in self._moved and not torch.compiler.is_compiling():
            return self._moved[device]
        moved = object.__new__(Control)
        moved.__dict__.update(self.__dict__, _moved={}, _devices=frozenset((device,)))
        for name in _TABLES:
            if (table := getattr(self, name)) is not None:
                setattr(moved, name, table.to(device))
        if not torch.compiler.is_compiling():
            self._moved[device] = moved
        return moved

    def __repr__(self) -> str:
        parts = [f"rows={self.rows!r}"] + ([] if self.keys is self.rows else [f"keys={self.keys!r}"])
        for name in ("bias", "weight", "gain", "gates", "valid"):
            if (table := getattr(self, name)) is not None:
                parts.append(f"{name}={tuple(table.shape)}")
        if self.head_gain is not None:
            parts.append(f"head_gain={self.head_gain!r}")
        if len(self.group_names) > 1:
            parts.append(f"groups={self.group_names!r}")
        if any(c is not None for c in self.contrast):
            parts.append(f"contrast={self.contrast!r}")
        return f"Control({', '.join(parts)})"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _readable(value: Tensor) -> bool:
    """Whether its values can be checked without a sync or a graph break."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_minus_inf(value: Value) -> bool:
    return not isinstance(value, Tensor) and value == -math.inf


# The bounds stand in the functions: a compiler takes them for constants there, and a module's for inputs.
def fits_float32(x: float) -> bool:
    """Whether the number is finite, and stays so in float32."""
    return -3.4028234663852886e38 <= x <= 3.4028234663852886e38


def _limits(kind: Literal["bias", "weight", "gain"]) -> tuple[float, float]:
    """The least and largest finite entry.

    A bias on all keys of a row takes digits of float32 away from lse, from which gradients and column_mass
    are recomputed. So it is bounded; -inf removes keys.
    """
    if kind == "bias":
        return -1e4, 1e4
    return 0.0 if kind == "weight" else -3.4028234663852886e38, 3.4028234663852886e38


def _check_tensor(argument: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{argument}: expected a float tensor, got {value.dtype}")
    if value.requires_grad:
        raise TypeError(
            f"{argument}: a control tensor that requires grad is not differentiated; pass value.detach()"
        )


def _check_value(argument: str, value: Value, kind: Literal["bias", "weight", "gain"]) -> Value:
    """Within _limits(), or a bias of -inf."""
    if isinstance(value, Tensor):
        _check_tensor(argument, value)
        if value.dim() not in (1, 2):
            raise ValueError(
                f"{argument}: expected a number or shape (heads,) or (batch, heads), got {tuple(value.shape)}"
            )
        if not _readable(value):
            return value
        as_used = value.detach().to(torch.float32)
        low, high = _limits(kind)
        good = (as_used >= low) & (as_used <= high)
        if kind == "bias":
            good |= as_used == -math.inf
        if not bool(good.all()):
            raise ValueError(f"{argument}: expected {_RANGE[kind]}, got values outside")
        return value
    if not _is_number(value) and not isinstance(value, (torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{argument}: expected a number or a tensor, got {type(value).__name__}")
    low, high = _limits(kind)
    if not low <= value <= high and not (kind == "bias" and value == -math.inf):
        raise ValueError(f"{argument}: expected {_RANGE[kind]}, got {value}")
    return value


_RANGE = {
    "bias": "a finite number or -inf, which removes, at most 1e4 in size",
    "weight": "a finite number >= 0",
    "gain": "a finite number",
}


def _as_batch_heads(value: Value) -> Value:
    if not isinstance(value, Tensor):
        return float(value)
    return value.detach() if value.dim() == 2 else value.detach()[None, :]


def _blank(values: list[Value], shape: tuple[int, ...], neutral: float, argument: str) -> Tensor:
    """A table (1|batch, 1|heads, *shape) of `neutral` wide enough for `values`."""
    batch, heads, device = 1, 1, torch.device("cpu")
    for value in values:
        if not isinstance(value, Tensor):
            continue
        value_batch, value_heads = (
            (1, value.shape[0]) if value.dim() == 1 else (value.shape[0], value.shape[1])
        )
        for what, have, got in (("batch", batch, value_batch), ("head", heads, value_heads)):
            if 1 not in (have, got) and have != got:
                raise ValueError(f"{argument}: the {what} counts of its tensors differ: {have} and {got}")
        batch, heads, device = max(batch, value_batch), max(heads, value_heads), value.device
    return torch.full((batch, heads, *shape), neutral, dtype=torch.float32, device=device)


def segment_indices(argument: str, names: str | Sequence[str], segments: Segments) -> tuple[int, ...]:
    if isinstance(names, str):
        if names == "*":
            return tuple(range(len(segments)))
        return (segments.index(names, argument),)
    if not isinstance(names, Sequence) or not names:
        raise TypeError(f"{argument}: expected a segment name, a sequence of them or '*', got {names!r}")
    return tuple(sorted({segments.index(name, argument) for name in names}))


def _lower_groups(
    groups: Mapping[str, Sequence[str]] | None, keys: Segments
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if groups is None:
        return ("all",), (0,) * len(keys)
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups: expected a dict of {{group: [key segments]}}, got {type(groups).__name__}")
    if not groups:
        raise ValueError("groups: expected at least one group, got none")
    of: dict[str, int] = {}
    for g, (group, members) in enumerate(groups.items()):
        if isinstance(members, str) or not isinstance(members, Sequence):
            raise TypeError(f"groups[{group!r}]: expected a list of key segments, got {members!r}")
        for name in members:
            keys.index(name, f"groups[{group!r}]")
            if name in of:
                raise ValueError(f"groups: key segment {name!r} is in more than one group")
            of[name] = g
    missing = [name for name in keys if name not in of]
    if missing:
        raise ValueError(f"groups: every key segment must be in a group; missing {', '.join(missing)}")
    return tuple(groups), tuple(of[name] for name in keys)


def _lower_contrast(
    contrast: Contrast | Mapping[str, Contrast] | None, group_names: tuple[str, ...]
) -> tuple[Contrast | None, ...]:
    if contrast is None or isinstance(contrast, Contrast):
        return (contrast,) * len(group_names)
    if not isinstance(contrast, Mapping):
        raise TypeError(f"contrast: expected Contrast or {{group: Contrast}}, got {type(contrast).__name__}")
    for group, value in contrast.items():
        if group not in group_names:
            raise ValueError(f"contrast: unknown group {group!r}; expected one of {', '.join(group_names)}")
        if not isinstance(value, Contrast):
            raise TypeError(f"contrast[{group!r}]: expected Contrast, got {type(value).__name__}")
    return tuple(contrast.get(name) for name in group_names)

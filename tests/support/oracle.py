"""The operator's formula (docs/architecture.md) in Python loops over float64 numbers: the tests' own truth.

It takes names, dicts and tensors as a user writes them, not the lowered problem, and imports nothing of the
library. The reference backend is tested against it, everything else against the reference or against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

REMOVED = -math.inf


@dataclass
class OracleCall:
    """One call of attention(). Segment sizes are per item, (batch, segments), even where items agree."""

    q: torch.Tensor  # (batch, rows, heads, dim)
    k: list[torch.Tensor]  # each (batch or 1, keys, kv_heads, dim)
    v: list[torch.Tensor]
    row_names: list[str]
    key_names: list[str]
    row_sizes: list[list[int]]
    key_sizes: list[list[int]]
    options: dict = field(default_factory=dict)  # Control's keyword arguments
    scale: float | torch.Tensor | None = None
    source: dict = field(default_factory=dict)
    mask: torch.Tensor | None = None


@dataclass
class OracleResult:
    out: np.ndarray  # (batch, rows, heads, dim)
    lse: np.ndarray  # (batch, heads, rows, groups)
    mass: np.ndarray  # (batch, heads, row segments, key segments)
    gain: np.ndarray  # (batch, heads, row segments)


def attention(call: OracleCall) -> OracleResult:
    options = call.options
    batch, heads = len(call.row_sizes), call.q.shape[2]
    rows, dim = call.q.shape[1], call.q.shape[3]
    repeat = heads // call.k[0].shape[2]
    groups = softmax_groups(call)
    n_row_segments, n_key_segments = len(call.row_names), len(call.key_names)
    result = OracleResult(
        out=np.zeros((batch, rows, heads, dim)),
        lse=np.full((batch, heads, rows, len(groups)), REMOVED),
        mass=np.zeros((batch, heads, n_row_segments, n_key_segments)),
        gain=np.ones((batch, heads, n_row_segments)),
    )
    for b in range(batch):
        q, k, v = (
            queries(call, b),
            joined(call.k, call.source.get("k"), b),
            joined(call.v, call.source.get("v"), b),
        )
        for h in range(heads):
            for i in range(rows):
                row, _ = segment_of(call.row_names, call.row_sizes[b], i)
                a = call.row_names.index(row)
                softmaxes = softmax_per_group(call, b, h, i, q[i, h], k[:, h // repeat])
                for g, (name, (lse, probabilities)) in enumerate(softmaxes.items()):
                    result.lse[b, h, i, g] = lse
                    gate = gate_of(options.get("gates", {}).get(name, 1.0), b, i)
                    for j, p in probabilities.items():
                        key, _ = segment_of(call.key_names, call.key_sizes[b], j)
                        result.mass[b, h, a, call.key_names.index(key)] += p
                        weight = last_entry(options.get("weight", {}), row, key, b, h, otherwise=1.0)
                        if weight != 0:
                            phi = contrasted(options.get("contrast"), name, p, len(probabilities))
                            result.out[b, i, h] += gate * weight * phi * v[j, h // repeat]
        multiply_gains(call, result, b, heads)
        for i in range(rows):
            a = call.row_names.index(segment_of(call.row_names, call.row_sizes[b], i)[0])
            result.out[b, i] *= result.gain[b, :, a, None]
    return result


def probabilities(call: OracleCall) -> torch.Tensor:
    """(batch, heads, rows, keys) float64: the softmax within each key's group, 0 for removed pairs."""
    batch, rows, heads = len(call.row_sizes), call.q.shape[1], call.q.shape[2]
    repeat = heads // call.k[0].shape[2]
    result = torch.zeros(batch, heads, rows, sum(t.shape[1] for t in call.k), dtype=torch.float64)
    for b in range(batch):
        q, k = queries(call, b), joined(call.k, call.source.get("k"), b)
        for h in range(heads):
            for i in range(rows):
                softmaxes = softmax_per_group(call, b, h, i, q[i, h], k[:, h // repeat])
                for _, of_keys in softmaxes.values():
                    for j, p in of_keys.items():
                        result[b, h, i, j] = p
    return result


def softmax_groups(call: OracleCall) -> dict[str, Sequence[str]]:
    return call.options.get("groups") or {"all": call.key_names}


def softmax_per_group(
    call: OracleCall, b: int, h: int, i: int, q: np.ndarray, k: np.ndarray
) -> dict[str, tuple[float, dict[int, float]]]:
    """{group: (lse, {key: probability})} of one row; q (dim,), k (keys, dim)."""
    row, _ = segment_of(call.row_names, call.row_sizes[b], i)
    groups = softmax_groups(call)
    logits: dict[str, dict[int, float]] = {name: {} for name in groups}
    for j in range(len(k)):
        key, place = segment_of(call.key_names, call.key_sizes[b], j)
        logit = logit_of(call, b, h, i, j, row, key, place, q, k[j])
        if logit is not None:
            logits[next(name for name, members in groups.items() if key in members)][j] = logit
    result: dict[str, tuple[float, dict[int, float]]] = {}
    for name, of_keys in logits.items():
        if not of_keys:
            result[name] = (REMOVED, {})
            continue
        largest = max(of_keys.values())
        total = sum(math.exp(s - largest) for s in of_keys.values())
        result[name] = (
            largest + math.log(total),
            {j: math.exp(s - largest) / total for j, s in of_keys.items()},
        )
    return result


def logit_of(
    call: OracleCall,
    b: int,
    h: int,
    i: int,
    j: int,
    row: str,
    key: str,
    place: int,
    q: np.ndarray,
    k: np.ndarray,
) -> float | None:
    """scale * <q, k> + bias + mask, None where the pair is removed; place: the key's within its segment."""
    valid = call.options.get("valid", {})
    if key in valid and place >= int(valid[key][b]):
        return None
    bias = last_entry(call.options.get("bias", {}), row, key, b, h, otherwise=0.0)
    if call.mask is not None:
        mask = call.mask
        entry = mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0, i, j]
        if mask.dtype == torch.bool:
            bias = bias if bool(entry) else REMOVED
        else:
            bias += float(entry)
    if bias == REMOVED:
        return None
    if call.scale is None:
        scale = 1 / math.sqrt(len(q))
    elif isinstance(call.scale, torch.Tensor):
        scale = float(call.scale[b] if call.scale.dim() == 1 else call.scale[b, h])
    else:
        scale = float(call.scale)
    return scale * sum(float(x) * float(y) for x, y in zip(q, k, strict=True)) + bias


def contrasted(contrast, group: str, p: float, count: int) -> float:
    """phi(p): beta p - (beta - 1) / count, clipped; count: the allowed keys of the row's group."""
    if isinstance(contrast, dict):
        contrast = contrast.get(group)
    if contrast is None:
        return p
    p = contrast.beta * p - (contrast.beta - 1) / count
    return p if contrast.clip is None else min(max(p, contrast.clip[0]), contrast.clip[1])


def multiply_gains(call: OracleCall, result: OracleResult, b: int, heads: int) -> None:
    """Multiplies result.gain[b] by the given gain and by the gain derived from result.mass[b]."""
    for a, row in enumerate(call.row_names):
        for h in range(heads):
            if row in call.options.get("gain", {}):
                result.gain[b, h, a] *= value_at(call.options["gain"][row], b, h)
    rule = call.options.get("head_gain")
    if rule is None:
        return
    rows, keys, apply_to = (
        names if wanted == "*" else [wanted] if isinstance(wanted, str) else list(wanted)
        for wanted, names in (
            (rule.rows, call.row_names),
            (rule.keys, call.key_names),
            (rule.apply_to, call.row_names),
        )
    )
    count = sum(size for name, size in zip(call.row_names, call.row_sizes[b], strict=True) if name in rows)
    mass = []  # of each head: the mass of the block, per row
    for h in range(heads):
        block = 0.0
        for row in rows:
            for key in keys:
                block += result.mass[b, h, call.row_names.index(row), call.key_names.index(key)]
        mass.append(block / max(count, 1))
    eps = 2.0**-23  # of float32
    for h in range(heads):
        if rule.norm == "minmax":
            relative = (mass[h] - min(mass)) / (max(mass) - min(mass) + eps)
        elif rule.norm == "mean":
            relative = mass[h] / max(sum(mass) / heads, eps)
        elif rule.norm == "max":
            relative = mass[h] / max(*mass, eps)
        else:
            relative = heads * math.exp(mass[h]) / sum(math.exp(x) for x in mass)
        for row in apply_to:
            result.gain[b, h, call.row_names.index(row)] *= rule.floor + rule.span * relative


def value_at(value: float | torch.Tensor, b: int, h: int) -> float:
    """An entry of a table: a number, (heads,) or (batch, heads)."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.dim() == 1:
        return float(value[h])
    return float(value[b if value.shape[0] > 1 else 0, h if value.shape[1] > 1 else 0])


def last_entry(entries: dict, row: str, key: str, b: int, h: int, otherwise: float) -> float:
    """The value of the last entry that names the pair of segments."""
    found = otherwise
    for (r, c), value in entries.items():
        if r in (row, "*") and c in (key, "*"):
            found = value_at(value, b, h)
    return found


def gate_of(gate: float | torch.Tensor, b: int, i: int) -> float:
    return float(gate[b if gate.shape[0] > 1 else 0, i]) if isinstance(gate, torch.Tensor) else float(gate)


def segment_of(names: list[str], sizes: list[int], token: int) -> tuple[str, int]:
    """(segment of a token, the token's place within it)"""
    for name, size in zip(names, sizes, strict=True):
        if token < size:
            return name, token
        token -= size
    raise IndexError(token)


def queries(call: OracleCall, b: int) -> np.ndarray:
    """(rows, heads, dim): what output item b reads of q."""
    source = call.source.get("q")
    return call.q[b if source is None else int(source[b])].double().numpy()


def joined(tensors: list[torch.Tensor], source, b: int) -> np.ndarray:
    """(keys, kv_heads, dim): what output item b reads of a list of keys or values."""
    parts = []
    for n, t in enumerate(tensors):
        index = source[n] if isinstance(source, list) else source
        item = int(index[b]) if index is not None else (b if t.shape[0] > 1 else 0)
        parts.append(t[item].double().numpy())
    return np.concatenate(parts, axis=0)

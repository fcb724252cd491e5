"""The operator's formula once more, in Python loops over numpy float64: an oracle for the reference backend.

It takes what a user writes (names, dicts, tensors), not the lowered problem, and shares no code with the
library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

NO_KEY = -math.inf


@dataclass
class Spec:
    """One call as a user would write it; sizes are per item, (batch, segments), whether or not the items
    agree.
    """

    q: torch.Tensor
    k: list[torch.Tensor]
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
class Answer:
    out: np.ndarray  # (B, M, H, D)
    lse: np.ndarray  # (B, H, M, G)
    mass: np.ndarray  # (B, H, R, C)
    gain: np.ndarray  # (B, H, R)


def number(value, b: int, h: int) -> float:
    """A value that is a number, (heads,) or (batch, heads)."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.dim() == 1:
        return float(value[h])
    return float(value[b if value.shape[0] > 1 else 0, h if value.shape[1] > 1 else 0])


def last_entry(entries: dict, row: str, key: str, b: int, h: int, otherwise: float) -> float:
    found = otherwise
    for (r, c), value in entries.items():
        if r in (row, "*") and c in (key, "*"):
            found = number(value, b, h)
    return found


def name_at(names: list[str], sizes: list[int], token: int) -> tuple[str, int]:
    """(segment, place within it)"""
    for name, size in zip(names, sizes, strict=True):
        if token < size:
            return name, token
        token -= size
    raise IndexError(token)


def item(tensors: list[torch.Tensor], index, b: int) -> np.ndarray:
    """What output item b reads of a key list: (tokens, heads, dim)."""
    parts = []
    for i, t in enumerate(tensors):
        where = index[i] if isinstance(index, list) else index
        n = int(where[b]) if where is not None else (b if t.shape[0] > 1 else 0)
        parts.append(t[n].double().numpy())
    return np.concatenate(parts, axis=0)


def solve(spec: Spec) -> Answer:
    opt = spec.options
    q_index = spec.source.get("q")
    B = len(spec.row_sizes)
    _, M, H, D = spec.q.shape
    N = sum(t.shape[1] for t in spec.k)
    repeat = H // spec.k[0].shape[2]
    groups = opt.get("groups") or {"all": spec.key_names}
    group_names = list(groups)
    R, C, G = len(spec.row_names), len(spec.key_names), len(groups)
    answer = Answer(
        np.zeros((B, M, H, D)), np.full((B, H, M, G), NO_KEY), np.zeros((B, H, R, C)), np.ones((B, H, R))
    )
    for b in range(B):
        q = spec.q[int(q_index[b]) if q_index is not None else b].double().numpy()
        k, v = item(spec.k, spec.source.get("k"), b), item(spec.v, spec.source.get("v"), b)
        for h in range(H):
            for i in range(M):
                row, _ = name_at(spec.row_names, spec.row_sizes[b], i)
                a = spec.row_names.index(row)
                logits: dict[str, dict[int, float]] = {g: {} for g in groups}
                for j in range(N):
                    key, place = name_at(spec.key_names, spec.key_sizes[b], j)
                    logit = logit_of(spec, b, h, i, j, row, key, place, q[i, h], k[j, h // repeat])
                    if logit is not None:
                        logits[next(g for g in groups if key in groups[g])][j] = logit
                for g, name in enumerate(group_names):
                    if not logits[name]:
                        continue
                    top = max(logits[name].values())
                    total = sum(math.exp(s - top) for s in logits[name].values())
                    answer.lse[b, h, i, g] = top + math.log(total)
                    gate = gate_of(opt.get("gates", {}).get(name, 1.0), b, i)
                    for j, s in logits[name].items():
                        p = math.exp(s - top) / total
                        key, _ = name_at(spec.key_names, spec.key_sizes[b], j)
                        answer.mass[b, h, a, spec.key_names.index(key)] += p
                        w = last_entry(opt.get("weight", {}), row, key, b, h, 1.0)
                        if w != 0:
                            shown = contrasted(opt.get("contrast"), name, p, len(logits[name]))
                            answer.out[b, i, h] += gate * w * shown * v[j, h // repeat]
        gains(spec, answer, b, H)
        for i in range(M):
            a = spec.row_names.index(name_at(spec.row_names, spec.row_sizes[b], i)[0])
            answer.out[b, i] *= answer.gain[b, :, a, None]
    return answer


def whole_map(spec: Spec) -> torch.Tensor:
    """(batch, heads, rows, keys) softmax within each key's group, by loops"""
    B, M, H, N = len(spec.row_sizes), spec.q.shape[1], spec.q.shape[2], sum(t.shape[1] for t in spec.k)
    groups = spec.options.get("groups") or {"all": spec.key_names}
    result = torch.zeros(B, H, M, N, dtype=torch.float64)
    repeat = H // spec.k[0].shape[2]
    for b in range(B):
        q = spec.q[int(spec.source["q"][b]) if spec.source else b]
        index = spec.source.get("k", [[b if t.shape[0] > 1 else 0 for b in range(B)] for t in spec.k])
        k = torch.cat([t[int(i[b])] for t, i in zip(spec.k, index, strict=True)])
        for h in range(H):
            for i in range(M):
                for names in groups.values():
                    logits = {}
                    for j in range(N):
                        key, place = name_at(spec.key_names, spec.key_sizes[b], j)
                        row = name_at(spec.row_names, spec.row_sizes[b], i)[0]
                        s = logit_of(spec, b, h, i, j, row, key, place, q[i, h], k[j, h // repeat])
                        if key in names and s is not None:
                            logits[j] = s
                    total = sum(map(math.exp, logits.values()))
                    for j, s in logits.items():
                        result[b, h, i, j] = math.exp(s) / total
    return result


def logit_of(spec: Spec, b, h, i, j, row, key, place, q_i, k_j) -> float | None:
    """None where the pair is removed."""
    opt = spec.options
    if key in opt.get("valid", {}) and place >= int(opt["valid"][key][b]):
        return None
    bias = last_entry(opt.get("bias", {}), row, key, b, h, 0.0)
    if spec.mask is not None:
        m = spec.mask
        entry = m[b if m.shape[0] > 1 else 0, h if m.shape[1] > 1 else 0, i, j]
        if m.dtype == torch.bool:
            bias = bias if bool(entry) else NO_KEY
        else:
            bias += float(entry)
    if bias == NO_KEY:
        return None
    if spec.scale is None:
        scale = 1 / math.sqrt(len(q_i))
    elif isinstance(spec.scale, torch.Tensor):
        scale = float(spec.scale[b] if spec.scale.dim() == 1 else spec.scale[b, h])
    else:
        scale = float(spec.scale)
    return scale * sum(float(x) * float(y) for x, y in zip(q_i, k_j, strict=True)) + bias


def gate_of(gate, b: int, i: int) -> float:
    return float(gate[b if gate.shape[0] > 1 else 0, i]) if isinstance(gate, torch.Tensor) else float(gate)


def contrasted(contrast, group: str, p: float, count: int) -> float:
    if isinstance(contrast, dict):
        contrast = contrast.get(group)
    if contrast is None:
        return p
    p = contrast.beta * p - (contrast.beta - 1) / count
    return p if contrast.clip is None else min(max(p, contrast.clip[0]), contrast.clip[1])


def gains(spec: Spec, answer: Answer, b: int, heads: int) -> None:
    for a, row in enumerate(spec.row_names):
        for h in range(heads):
            if row in spec.options.get("gain", {}):
                answer.gain[b, h, a] *= number(spec.options["gain"][row], b, h)
    rule = spec.options.get("head_gain")
    if rule is None:
        return
    rows, keys, apply_to = (
        names if name == "*" else [name] if isinstance(name, str) else list(name)
        for name, names in (
            (rule.rows, spec.row_names),
            (rule.keys, spec.key_names),
            (rule.apply_to, spec.row_names),
        )
    )
    count = sum(size for name, size in zip(spec.row_names, spec.row_sizes[b], strict=True) if name in rows)
    m = []
    for h in range(heads):
        block = 0.0
        for r in rows:
            for c in keys:
                block += answer.mass[b, h, spec.row_names.index(r), spec.key_names.index(c)]
        m.append(block / max(count, 1))
    eps = 2.0**-23
    for h in range(heads):
        if rule.norm == "minmax":
            relative = (m[h] - min(m)) / (max(m) - min(m) + eps)
        elif rule.norm == "mean":
            relative = m[h] / max(sum(m) / heads, eps)
        elif rule.norm == "max":
            relative = m[h] / max(*m, eps)
        else:
            relative = heads * math.exp(m[h]) / sum(math.exp(x) for x in m)
        for row in apply_to:
            answer.gain[b, h, spec.row_names.index(row)] *= rule.floor + rule.span * relative

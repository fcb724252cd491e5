"""The operator's formula over dense tables, from what a user writes: the truth of the checks, and their
allowance.

s_ij = scale * <q_i, k_j> + bias[h, a(i), c(j)]        p_ij = softmax over the keys of group(c(j))
o_i  = gain[h, a(i)] * sum_g gate_g(i) * sum_{c in g} weight[h, a(i), c] * sum_{j in c} phi(p_ij) v_j
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...bindings import Contrast, Control, HeadGain, Segments
from .truth import contrasted

Lengths = Mapping[str, int | Tensor]
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Problem:
    """The arguments of one attention; options are Control's keyword arguments; lengths: ints, or int tensors
    (batch,).
    """

    q: Tensor
    k: Tensor | list[Tensor]
    v: Tensor | list[Tensor]
    rows: Lengths
    keys: Lengths
    options: dict[str, Any] = field(default_factory=dict)
    scale: float | Tensor | None = None
    source: dict[str, Tensor] = field(default_factory=dict)

    def control(self) -> Control | None:
        if not self.options and len(self.rows) == len(self.keys) == 1:
            return None
        return Control(Segments(dict(self.rows)), Segments(dict(self.keys)), **self.options)

    @property
    def keywords(self) -> dict[str, Any]:
        return {"scale": self.scale, "source": self.source or None}


@dataclass(frozen=True, eq=False)
class Answer:
    out: Tensor  # (batch, rows, heads, dim)
    lse: Tensor  # (batch, heads, rows, groups)
    mass: Tensor  # (batch, heads, row segments, key segments)
    gain: Tensor  # (batch, heads, row segments)
    magnitude: float  # largest sum of the terms' sizes


def answer(problem: Problem, wide: torch.dtype, rounding: torch.dtype | None = None) -> Answer:
    """Computed in `wide`; the probabilities and the output are rounded to another dtype where one is given.

    Differentiable in q, k and v; a derived gain counts as a constant.
    """
    p, device = problem, problem.q.device
    q, k, v = (_tokens(t, p.source.get(n), p.q, n).to(wide) for t, n in ((p.q, "q"), (p.k, "k"), (p.v, "v")))
    batch, heads = q.shape[:2]
    k, v = (t.expand(batch, -1, -1, -1).repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    a, _ = _labels(p.rows, batch, q.shape[2], device)
    c, rank = _labels(p.keys, batch, k.shape[2], device)

    def pairs(entries: Mapping, neutral: float) -> Tensor:
        table = torch.full((batch, heads, len(p.rows), len(p.keys)), neutral, dtype=wide, device=device)
        for (row, key), value in entries.items():
            for i in _places(row, p.rows):
                for j in _places(key, p.keys):
                    table[:, :, i, j] = torch.as_tensor(value, dtype=wide, device=device)
        at = table.gather(2, a[:, None, :, None].expand(batch, heads, -1, len(p.keys)))
        return at.gather(3, c[:, None, None, :].expand(batch, heads, a.shape[1], -1))

    scale = q.shape[3] ** -0.5 if p.scale is None else torch.as_tensor(p.scale, device=device).to(wide)
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale.reshape(scale.shape[0], -1, 1, 1)
    bias, weight = pairs(p.options.get("bias", {}), 0.0), pairs(p.options.get("weight", {}), 1.0)
    allowed = bias != -math.inf
    for key, count in p.options.get("valid", {}).items():
        mine = c == list(p.keys).index(key)
        allowed = allowed & ~(mine & (rank >= count.to(device)[:, None]))[:, None, None, :]
    # A removed key's values may be anything.
    seen = allowed.any(2).all(1)[:, None, :, None]
    k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
    s = q @ k.mT * scale + bias

    names = p.options.get("groups") or {"all": list(p.keys)}
    contrast = p.options.get("contrast")
    out, size = torch.zeros_like(q), torch.zeros_like(q)
    mass = torch.zeros(batch, heads, len(p.rows), len(p.keys), dtype=wide, device=device)
    in_row = torch.nn.functional.one_hot(a, len(p.rows)).to(wide)
    in_key = torch.nn.functional.one_hot(c, len(p.keys)).to(wide)
    lse = []
    for name, members in names.items():
        of_group = torch.isin(c, torch.tensor([list(p.keys).index(m) for m in members], device=device))
        mine = allowed & of_group[:, None, None, :]
        logits = torch.where(mine, s, -math.inf)
        some = mine.any(-1, keepdim=True)
        prob = torch.where(mine, torch.softmax(torch.where(some, logits, 0), -1), 0)
        lse.append(torch.logsumexp(logits.detach(), -1))
        mass += torch.einsum("bmr,bhmn,bnc->bhrc", in_row, prob.detach(), in_key)
        prob = _rounded(prob, rounding)
        form = contrast.get(name) if isinstance(contrast, Mapping) else contrast
        terms = prob
        if isinstance(form, Contrast):
            count = mine.sum(-1, keepdim=True).clamp(min=1)
            terms = torch.where(mine, contrasted(prob, form, count, absolute=True), 0)
            prob = _rounded(torch.where(mine, contrasted(prob, form, count), 0), rounding)
        gate = torch.as_tensor(p.options.get("gates", {}).get(name, 1.0), device=device).to(wide)
        gate = gate[:, None, :, None] if gate.dim() else gate
        out = out + gate * ((prob * weight) @ v)
        size += gate.abs() * ((terms.detach() * weight) @ v.detach().abs())
    gain = _gain(p, mass, heads)
    at_row = gain.gather(2, a[:, None].expand(batch, heads, -1))[..., None]
    out = _rounded(out * at_row, rounding).transpose(1, 2)
    return Answer(
        out, torch.stack(lse, -1), mass, gain, float((size * at_row.abs()).max()) if size.numel() else 0.0
    )


def _rounded(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t if dtype is None else t.to(dtype).to(t.dtype)


def _gain(p: Problem, mass: Tensor, heads: int) -> Tensor:
    gain = torch.ones(mass.shape[:3], dtype=mass.dtype, device=mass.device)
    for row, value in p.options.get("gain", {}).items():
        for i in _places(row, p.rows):
            gain[:, :, i] = torch.as_tensor(value, dtype=mass.dtype, device=mass.device)
    rule = p.options.get("head_gain")
    if not isinstance(rule, HeadGain):
        return gain
    rows = list(_places(rule.rows, p.rows))
    block = mass[:, :, rows][..., list(_places(rule.keys, p.keys))].sum((2, 3))
    lengths = list(p.rows.values())
    count = sum(torch.as_tensor(lengths[i], device=mass.device) for i in rows)
    assert isinstance(count, Tensor)
    m = block / (count[:, None] if count.dim() else count)
    if rule.norm == "minmax":
        low, high = m.amin(1, keepdim=True), m.amax(1, keepdim=True)
        relative = (m - low) / (high - low + EPS)
    elif rule.norm == "mean":
        relative = m / m.mean(1, keepdim=True)
    elif rule.norm == "max":
        relative = m / m.amax(1, keepdim=True)
    else:
        relative = heads * torch.softmax(m, 1)
    for i in _places(rule.apply_to, p.rows):
        gain[:, :, i] *= rule.floor + rule.span * relative
    return gain


def _tokens(t: Tensor | list[Tensor], index: Tensor | None, q: Tensor, name: str) -> Tensor:
    """(batch or 1, heads, tokens, dim)"""
    parts = [t] if isinstance(t, Tensor) else t
    parts = [part if index is None else part[index.to(part.device)] for part in parts]
    most = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(most, -1, -1, -1) for part in parts], 1).transpose(1, 2)


def _labels(lengths: Lengths, batch: int, total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(segment of each token, its place within it), (batch, tokens) int64"""
    counts = torch.stack(
        [torch.as_tensor(n, device=device).long().expand(batch) for n in lengths.values()], 1
    )
    ends = counts.cumsum(1)
    token = torch.arange(total, device=device).expand(batch, total)
    label = (token[:, :, None] >= ends[:, None, :]).sum(-1)
    return label, token - (ends - counts).gather(1, label)


def _places(name: str | Sequence[str], lengths: Lengths) -> list[int]:
    if name == "*":
        return list(range(len(lengths)))
    return [list(lengths).index(n) for n in ([name] if isinstance(name, str) else name)]

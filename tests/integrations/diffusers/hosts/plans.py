"""Plans of every field for test_contract.py, each beside the same arithmetic with the map in memory.

Plans are for a batch of 3 and layers of any kind but "added".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations.diffusers import Layer, Part, Plan

from ...methods.eager import FluxCore, Rope, Site, attend, rotate

BATCH = 3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(total: int) -> int:
    """Where plans split the layer's rows or keys into two segments."""
    return max(1, total // 3)


def first(total: int) -> Tensor:
    """bool (tokens,): the tokens before the cut."""
    return torch.arange(total) < cut(total)


def split(total: int, a: str, b: str) -> fb.Segments:
    return fb.Segments({a: cut(total), b: total - cut(total)})


@dataclass(frozen=True)
class Case:
    """A plan for a layer, and its eager form on q, k, v (batch, heads, tokens, head_dim)."""

    plan: Callable[[Layer], Plan]
    core: Any


# Fields of Plan


WEIGHT = draw(1, BATCH, 4).abs()  # heads of every tiny model: 4


def control(layer: Layer) -> Plan:
    tables = fb.Control(
        split(layer.rows, "a", "b"),
        split(layer.keys, "c", "d"),
        weight={("b", "c"): WEIGHT},
        bias={("a", "d"): -math.inf, ("b", "d"): 0.6},
        gain={"a": 0.8},
    )
    return Plan(tables)


def eager_control(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, c = first(q.shape[2])[:, None], first(k.shape[2])[None]
    bias = torch.where(a & ~c, -torch.inf, torch.where(~a & ~c, 0.6, 0.0))
    weight = torch.where(~a & c, WEIGHT[:, :, None, None], 1.0)
    prob = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + bias, -1)
    return torch.where(a, 0.8, 1.0) * ((prob * weight) @ v)


SOURCE = {"q": torch.tensor([0, 2, 2]), "k": torch.tensor([1, 0, 2]), "v": torch.tensor([2, 2, 0])}


def eager_source(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q[SOURCE["q"]], k[SOURCE["k"]], v[SOURCE["v"]])


def registers(layer: Layer) -> Plan:
    """Keys that are no tokens, between the layer's, with source for the layer's own."""
    pair = draw(2, 1, 3, layer.heads, layer.head_dim), draw(3, BATCH, 3, layer.heads, layer.head_dim)
    keys = fb.Segments({"c": cut(layer.keys), "r": 3, "d": layer.keys - cut(layer.keys)})
    tables = fb.Control(split(layer.rows, "a", "b"), keys, weight={("b", "r"): 0.4})
    return Plan(tables, extra={"r": pair}, source={"v": torch.tensor([1, 0, 2])})


def eager_registers(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rk = draw(2, 1, 3, q.shape[1], q.shape[3]).transpose(1, 2).expand(BATCH, -1, -1, -1)
    rv = draw(3, BATCH, 3, q.shape[1], q.shape[3]).transpose(1, 2)
    prob = torch.softmax(q @ torch.cat([k, rk], 2).mT / math.sqrt(q.shape[-1]), -1)
    prob[:, :, cut(q.shape[2]) :, k.shape[2] :] *= 0.4
    return prob @ torch.cat([v[[1, 0, 2]], rv], 2)


def copies(layer: Layer) -> Plan:
    """Keys made of the layer's own after RoPE and Plan.value, with the tokens sorted for the control."""

    def halved(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key[:1, :2], value[:1, :2] / 2

    keys = fb.Segments(tokens=layer.keys, copies=2)
    tables = fb.Control(fb.Segments(tokens=layer.rows), keys)
    order = torch.arange(layer.rows).flip(0)
    return Plan(tables, extra={"copies": halved}, value=torch.negative, order=order)


def eager_copies(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    more = [t[:1, :, :2].expand(BATCH, -1, -1, -1) for t in (k, -v / 2)]
    return attend(q, torch.cat([k, more[0]], 2), torch.cat([-v, more[1]], 2))


def offsets(layer: Layer) -> Plan:
    q_offset = draw(4, 1, layer.rows, layer.heads, layer.head_dim)
    return Plan(q_offset=q_offset, k_offset=draw(5, layer.keys, 1, layer.head_dim))


class EagerOffsets(FluxCore):
    """Between norm and RoPE."""

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        q = q + draw(4, 1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        k = k + draw(5, k.shape[2], 1, k.shape[3]).transpose(0, 1)
        return attend(rotate(q, rope), rotate(k, rope), v)


class EagerOffsetOfQ(FluxCore):
    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        q = q + draw(4, 1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        return attend(rotate(q, rope), rotate(k, rope), v)


def transforms(layer: Layer) -> Plan:
    return Plan(query=lambda q: q.mean(1, keepdim=True).expand_as(q), value=lambda v: v.roll(1, 1), scale=0.3)


def eager_transforms(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = 0.3 * math.sqrt(q.shape[-1]) * q.mean(2, keepdim=True).expand_as(q)
    return attend(q, k, v.roll(1, 2))


def marked(rows: int) -> Tensor:
    """bool (batch, rows): interleaved tokens, as many in each item."""
    return (torch.arange(rows)[None] + torch.arange(BATCH)[:, None] * 2) % rows % 3 == 0


def order(layer: Layer) -> Plan:
    """Interleaved segments, different in each item; in "cross" the rows alone are sorted."""
    rows, tokens, _ = fb.Segments.from_labels(marked(layer.rows).int(), ["rest", "marked"])
    if layer.kind == "cross":
        tables = fb.Control(rows, fb.Segments(text=layer.keys), weight={("marked", "*"): 1.7})
    else:
        tables = fb.Control(rows, weight={("marked", "rest"): 1.7}, bias={("rest", "marked"): 0.6})
    return Plan(tables, order=tokens, q_offset=torch.zeros(layer.rows, 1, 1))


def eager_order(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mine = marked(q.shape[2])[:, None, :, None]
    if site.cross:
        return torch.where(mine, 1.7, 1.0) * attend(q, k, v)
    theirs = mine.mT
    bias = torch.where(~mine & theirs, 0.6, 0.0)
    prob = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + bias, -1)
    return (prob * torch.where(mine & ~theirs, 1.7, 1.0)) @ v


class EagerHidden(FluxCore):
    def states(self, site: Site, image: Tensor) -> Tensor:
        return image.flip(1)


def hidden(layer: Layer) -> Plan:
    text = layer.text_len if layer.kind == "single" else 0
    return Plan(hidden=lambda x: torch.cat([x[:, :text], x[:, text:].flip(1)], 1))


def everything(layer: Layer) -> Plan:
    """Weights, a group with a gate, sources, extra keys, offsets, transforms and a scale in one call."""
    pair = draw(7, 1, 3, layer.heads, layer.head_dim), draw(8, 1, 3, layer.heads, layer.head_dim)
    keys = {"c": cut(layer.keys), "d": layer.keys - cut(layer.keys), "r": 3}
    tables = fb.Control(
        split(layer.rows, "a", "b"),
        fb.Segments(keys),
        weight={("b", "c"): 1.7},
        groups={"own": ["c", "d"], "more": ["r"]},
        gates={"more": draw(9, BATCH, layer.rows).sigmoid()},
    )
    return Plan(
        tables,
        source=SOURCE,
        extra={"r": pair},
        q_offset=draw(4, 1, layer.rows, layer.heads, layer.head_dim),
        k_offset=draw(5, layer.keys, 1, layer.head_dim),
        query=lambda q: q * 0.8,
        value=lambda v: v.roll(1, 1),
        scale=0.2,
    )


class EagerEverything(FluxCore):
    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        q = q + draw(4, 1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        k = k + draw(5, k.shape[2], 1, k.shape[3]).transpose(0, 1)
        q = 0.8 * rotate(q, rope)[SOURCE["q"]] * 0.2 * math.sqrt(q.shape[-1])
        k, v = rotate(k, rope)[SOURCE["k"]], v.roll(1, 2)[SOURCE["v"]]
        prob = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        prob[:, :, cut(q.shape[2]) :, : cut(k.shape[2])] *= 1.7
        rk, rv = (draw(seed, 1, 3, q.shape[1], q.shape[3]).transpose(1, 2) for seed in (7, 8))
        more = attend(q, rk.expand(BATCH, -1, -1, -1), rv.expand(BATCH, -1, -1, -1))
        return prob @ v + draw(9, BATCH, q.shape[2]).sigmoid()[:, None, :, None] * more


# Parts


def both_keys(layer: Layer) -> Plan:
    """Items 2 and 0 read the keys of both in one softmax; item 1 has the plan's control."""
    index = [torch.tensor([0, 0]), torch.tensor([2, 2])]
    tables = fb.Control(
        split(layer.rows, "a", "b"), fb.Segments(keys=layer.keys), weight={("b", "keys"): 1.7}
    )
    return Plan(tables, parts=[Part((2, 0), {"k": index, "v": index})])


def eager_both_keys(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    joined = [torch.cat([t[[0]], t[[2]]], 2).expand(BATCH, -1, -1, -1) for t in (k, v)]
    out = attend(q, *joined)
    out[1] = (torch.where(first(q.shape[2])[:, None], 1.0, 1.7) * attend(q, k, v))[1]
    return out


def sums(layer: Layer) -> Plan:
    """Item 1 is in two parts and gets their sum; item 0 is plain."""
    gate = draw(6, 2, layer.rows).sigmoid()
    reader = Part((1,), {"q": torch.tensor([0])}, scale=0.2, query=torch.negative, value=lambda v: 2 * v)
    return Plan(parts=[reader, Part((2, 1), gate=gate)])


def eager_sums(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, gate = attend(q, k, v), draw(6, 2, q.shape[2]).sigmoid()[:, None, :, None]
    out[[2, 1]] = gate * out[[2, 1]]
    out[1] += attend(-0.2 * math.sqrt(q.shape[-1]) * q[[0]], k[[1]], 2 * v[[1]])[0]
    return out


def sorted_keys(layer: Layer) -> Plan:
    """Two softmaxes, over every third key and over the others."""
    segments, keys, _ = fb.Segments.from_labels((torch.arange(layer.keys) % 3 > 0).int(), ["one", "two"])
    groups = {"one": ["one"], "two": ["two"]}
    tables = fb.Control(fb.Segments(rows=layer.rows), segments, groups=groups, gates={"one": 0.3})
    return Plan(parts=[Part((0, 2), control=tables, key_order=keys)])


def eager_sorted_keys(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    one = torch.arange(k.shape[2]) % 3 == 0
    out = 0.3 * attend(q, k[:, :, one], v[:, :, one]) + attend(q, k[:, :, ~one], v[:, :, ~one])
    out[1] = attend(q, k, v)[1]
    return out


def own_attention(layer: Layer) -> Plan:
    """Part.attend: a kernel that is no softmax."""

    def squared(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        logits = torch.einsum("nrhd,nkhd->nhrk", q, k) / q.shape[-1]
        return torch.einsum("nhrk,nkhd->nrhd", logits * logits, v)

    return Plan(parts=[Part((1, 2), {"k": torch.tensor([0, 0])}, attend=squared)])


def eager_own_attention(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = (q @ k[[0, 0, 0]].mT / q.shape[-1]).square() @ v
    out[0] = attend(q, k, v)[0]
    return out


CASES = {
    "control": Case(control, eager_control),
    "source": Case(lambda layer: Plan(source=SOURCE), eager_source),
    "extra keys": Case(registers, eager_registers),
    "extra keys made of the layer's, sorted": Case(copies, eager_copies),
    "offsets": Case(offsets, EagerOffsets()),
    "offset of q alone": Case(lambda layer: replace(offsets(layer), k_offset=None), EagerOffsetOfQ()),
    "query, value and scale": Case(transforms, eager_transforms),
    "order": Case(order, eager_order),
    "everything in one call": Case(everything, EagerEverything()),
    "hidden": Case(hidden, EagerHidden()),
    "parts: keys of two items": Case(both_keys, eager_both_keys),
    "parts: sums": Case(sums, eager_sums),
    "parts: key_order": Case(sorted_keys, eager_sorted_keys),
    "parts: attend": Case(own_attention, eager_own_attention),
}

"""Random calls of fb.attention for hypothesis."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import torch
from hypothesis import assume, strategies as st
from torch import Tensor

import flashbrush as fb
from flashbrush.bindings.core.lowering import lower
from flashbrush.bindings.core.problem import Problem

WEIGHTS = (0.0, 0.25, 0.7, 1.0, 1.3, 4.0)


def examples(count: int) -> int:
    """FLASHBRUSH_TEST_PERCENT of `count`, at least 1: how many examples a property test draws."""
    return max(1, count * int(os.environ.get("FLASHBRUSH_TEST_PERCENT", "25")) // 100)


@dataclass
class Call:
    """The arguments of one call of fb.attention."""

    q: Tensor
    k: Tensor | list[Tensor]
    v: Tensor | list[Tensor]
    control: fb.Control | None
    kwargs: dict = field(default_factory=dict)

    def run(self, backend: str, **more):
        return fb.attention(self.q, self.k, self.v, self.control, backend=backend, **self.kwargs, **more)

    def to(self, dtype: torch.dtype) -> Call:
        def cast(t):
            return [x.to(dtype) for x in t] if isinstance(t, list) else t.to(dtype)

        return Call(cast(self.q), cast(self.k), cast(self.v), self.control, self.kwargs)

    def on(self, device: torch.device) -> Call:
        def move(x):
            if isinstance(x, (list, dict)):
                return (
                    [move(t) for t in x] if isinstance(x, list) else {name: move(t) for name, t in x.items()}
                )
            return x.to(device) if isinstance(x, Tensor) else x

        return Call(move(self.q), move(self.k), move(self.v), self.control, move(self.kwargs))

    def problem(self) -> Problem:
        more = {name: self.kwargs.get(name) for name in ("scale", "source", "mask")}
        return lower(self.q, self.k, self.v, self.control, **more)

    def __repr__(self) -> str:
        def show(t):
            return [tuple(x.shape) for x in t] if isinstance(t, list) else (tuple(t.shape), t.stride())

        tensors = f"q={show(self.q)}, k={show(self.k)}, {self.q.dtype}"
        return f"Call({tensors}, {self.control!r}, {sorted(self.kwargs)})"


@st.composite
def random_calls(
    draw,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    dims=(1, 3, 8, 17, 32, 40, 64, 80, 128),
    longest: int = 90,
    clip: bool = True,
    contrast: bool = True,
    mask: bool = False,
    source: bool = True,
    items: bool = True,
    weights: tuple[float, ...] | None = None,
    row_sizes: tuple[int, ...] | None = None,
) -> Call:
    """A call with random segments (empty ones too), tables, groups, gates, contrast, strides and sources.

    Args:
        dtypes: of q, k and v.
        dims: head dims.
        longest: the largest length of a segment, in tokens.
        clip: also a contrast that is clipped.
        contrast: also a contrast.
        mask: also a dense mask.
        source: also batch items read by index.
        items: also segments whose lengths differ between items.
        weights: the numbers that a weight may be; None: WEIGHTS, and extreme ones in float32.
        row_sizes: the lengths of row segments; None: those of key segments.
    """
    chance = lambda p: draw(st.integers(0, 99)) < 100 * p  # noqa: E731
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    dtype, dim = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dims))
    batch, kv_heads, repeat = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from((1, 1, 2, 3))),
    )
    heads = kv_heads * repeat

    key_sizes = (0, 1, 2, 5, 16, 31, 33, longest)

    def lengths(prefix: str, sizes: tuple[int, ...]) -> dict[str, int]:
        count = draw(st.integers(1, 4))
        return {f"{prefix}{i}": draw(st.sampled_from(sizes)) for i in range(count)}

    same = chance(0.4)
    row_lengths = lengths("s", row_sizes or key_sizes)
    key_lengths = dict(row_lengths) if same else lengths("k", key_sizes)

    def segments(sizes: dict[str, int], by_item: bool) -> fb.Segments:
        """by_item: the first and the last segment share their tokens differently in each item."""
        names = list(sizes)
        if not by_item or len(names) < 2:
            return fb.Segments(sizes)
        first, second = names[0], names[-1]
        both = sizes[first] + sizes[second]
        share = torch.randint(0, both + 1, (out_batch,), generator=generator)
        return fb.Segments({**sizes, first: share, second: both - share})

    indexed = source and chance(0.2)
    out_batch = draw(st.integers(1, 4)) if indexed else batch
    listed = not (by_item := items and chance(0.15)) and chance(0.3)
    rows = segments(row_lengths, items and chance(0.15))
    keys = rows if same and not by_item and rows.items is None else segments(key_lengths, by_item)

    def tensor(tokens: int, n_heads: int, broadcast: bool = True) -> Tensor:
        size = 1 if broadcast and chance(0.15) else batch
        layout = draw(st.sampled_from(("bshd", "bhsd", "padded")))
        if layout == "bhsd":
            t = torch.randn(size, n_heads, tokens, dim, generator=generator).transpose(1, 2)
        elif layout == "padded":
            t = torch.randn(size, tokens, n_heads, dim + 3, generator=generator)[..., :dim]
        else:
            t = torch.randn(size, tokens, n_heads, dim, generator=generator)
        return t.to(dtype)  # preserves the strides' order

    q = tensor(rows.total, heads, broadcast=False)
    if listed:
        k = [tensor(n, kv_heads) for n in keys.lengths]
        v = [tensor(n, kv_heads) for n in keys.lengths]
    else:
        k, v = tensor(keys.total, kv_heads), tensor(keys.total, kv_heads)

    def value(numbers: tuple[float, ...], signed: bool):
        form = draw(st.sampled_from(("number", "number", "heads", "batch")))
        if form == "number":
            return draw(st.sampled_from(numbers))
        shape = (heads,) if form == "heads" else (out_batch, heads)
        t = torch.randn(shape, generator=generator)
        return t if signed else t.abs()

    def pairs(numbers: tuple[float, ...], signed: bool) -> dict:
        names = st.tuples(st.sampled_from((*rows.names, "*")), st.sampled_from((*keys.names, "*")))
        return {draw(names): value(numbers, signed) for _ in range(draw(st.integers(1, 3)))}

    options: dict = {}
    if chance(0.5):
        options["bias"] = pairs((-math.inf, -math.inf, -2.0, 0.0, 1.5), True)
    if chance(0.5):
        default = (*WEIGHTS, 1e-25, 1e20) if dtype == torch.float32 else WEIGHTS
        options["weight"] = pairs(weights or default, False)
    if chance(0.3):
        options["gain"] = {draw(st.sampled_from(rows.names)): value((0.5, -1.0, 0.0), True)}
    if chance(0.3):
        options["head_gain"] = fb.HeadGain(
            rows=draw(st.sampled_from((*rows.names, "*"))),
            keys=draw(st.sampled_from((*keys.names, "*"))),
            norm=draw(st.sampled_from(("minmax", "mean", "max", "softmax"))),
            apply_to=draw(st.sampled_from((*rows.names, "*"))),
        )
    if len(keys) > 1 and chance(0.35):
        owner = [draw(st.integers(0, 2)) for _ in keys.names]
        groups = {
            f"g{i}": [n for n, o in zip(keys.names, owner, strict=True) if o == i] for i in sorted(set(owner))
        }
        options["groups"] = groups
        if chance(0.6):
            name = draw(st.sampled_from(list(groups)))
            gate = torch.rand(draw(st.sampled_from((1, out_batch))), rows.total, generator=generator)
            options["gates"] = {name: gate if chance(0.6) else 0.8}
    if contrast and chance(0.2):
        options["contrast"] = fb.Contrast(1.67, (0.0, 1.0) if clip and chance(0.6) else None)
    if chance(0.2):
        name = draw(st.sampled_from(keys.names))
        limit = (
            keys.lengths[keys.names.index(name)]
            if keys.items is None
            else int(keys.items[:, keys.names.index(name)].min())
        )
        options["valid"] = {name: torch.randint(0, limit + 1, (out_batch,), generator=generator)}
    plain = not options and not listed and rows.items is None and keys.items is None
    control = None if plain and chance(0.5) else fb.Control(rows, keys, **options)

    kwargs: dict = {}
    if indexed:

        def index(t: Tensor) -> Tensor:
            return torch.randint(0, t.shape[0], (out_batch,), generator=generator)

        kwargs["source"] = {"q": index(q), "k": [index(t) for t in k] if listed else index(k)}
        kwargs["source"]["v"] = [index(t) for t in v] if listed else index(v)
    if chance(0.3):
        form = draw(st.sampled_from(("number", "batch", "heads")))
        shape = {"batch": (out_batch,), "heads": (out_batch, heads)}.get(form)
        kwargs["scale"] = (
            0.3 if shape is None else (0.3 + torch.rand(shape, generator=generator)) * 1.5 / dim**0.5
        )
    if mask and chance(0.5):
        m = torch.rand(draw(st.sampled_from((1, out_batch))), 1, rows.total, keys.total, generator=generator)
        kwargs["mask"] = m > 0.3 if chance(0.5) else (m - 0.5) * 4
    call = Call(q, k, v, control, kwargs)
    assume(well_conditioned(call))
    return call


def well_conditioned(call: Call) -> bool:
    """True unless a minmax gain divides by a spread of the heads' mass that is all rounding."""
    rule = None if call.control is None else call.control.head_gain
    if rule is None or rule.norm != "minmax" or call.q.shape[2] == 1:
        return True
    p = call.problem()
    assert p.head_gain is not None
    mass = call.to(torch.float64).run("reference", return_stats=True)[1].mass
    block = mass[:, :, list(p.head_gain.rows)][..., list(p.head_gain.keys)].sum((2, 3)) / max(1, p.rows)
    spread = block.amax(1) - block.amin(1)
    return bool(((spread > 1e-3) | (block.amax(1) == 0)).all())

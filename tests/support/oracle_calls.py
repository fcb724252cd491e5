"""Random small calls for the oracle, and the library's answer to them.

They hold names and dicts rather than a Control, so that a test can rewrite them.
"""

from __future__ import annotations

import math
import random

import torch

import flashbrush as fb

from .oracle import OracleCall


def random_partition(total: int, parts: int, rng: random.Random) -> list[int]:
    """Sizes >= 0 that add up to total."""
    marks = sorted(rng.randint(0, total) for _ in range(parts - 1))
    return [b - a for a, b in zip([0, *marks], [*marks, total], strict=True)]


def random_oracle_call(seed: int) -> OracleCall:
    """A small float64 call with a random subset of the operator's features.

    Seeds 0 to 3 have a head gain with each of the four norms.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, repeat = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 2)
    heads, dim, M, N = kv_heads * repeat, rng.choice((1, 2, 5)), rng.randint(0, 7), rng.randint(1, 9)
    indexed = rng.random() < 0.3
    B = rng.randint(1, 3) if indexed else batch
    row_names = [f"r{i}" for i in range(rng.randint(1, 3))]
    key_names = [f"k{i}" for i in range(rng.randint(1, 4))]

    def sizes(total: int, names: list[str], vary: bool) -> list[list[int]]:
        first = random_partition(total, len(names), rng)
        return [random_partition(total, len(names), rng) if vary and b else first for b in range(B)]

    row_sizes, key_sizes = sizes(M, row_names, rng.random() < 0.4), sizes(N, key_names, rng.random() < 0.4)
    random_tensor = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    uniform = all(s == key_sizes[0] for s in key_sizes)
    lengths = key_sizes[0] if uniform and rng.random() < 0.4 else [N]
    q = random_tensor(batch, M, heads, dim)
    k, v = ([random_tensor(rng.choice((1, batch)), n, kv_heads, dim) for n in lengths] for _ in range(2))

    def value(positive: bool = False):
        t = random_tensor(*rng.choice(((heads,), (B, heads))))
        t = t.float().abs() if positive else t.float()
        return rng.choice((0.5, 1.25, 0.0, t, t))

    def pairs(positive: bool) -> dict:
        entries = {}
        for _ in range(rng.randint(1, 3)):
            entries[rng.choice((*row_names, "*")), rng.choice((*key_names, "*"))] = value(positive)
        return entries

    options: dict = {}
    if rng.random() < 0.5:
        options["bias"] = pairs(False)
        if rng.random() < 0.6:
            options["bias"][rng.choice(row_names), rng.choice((*key_names, "*"))] = -math.inf
    if rng.random() < 0.5:
        options["weight"] = pairs(True)
    if rng.random() < 0.4:
        options["gain"] = {rng.choice(row_names): value()}
    if rng.random() < 0.5 or seed < 4:
        norm = ("minmax", "mean", "max", "softmax")[seed % 4]
        names = [
            rng.choice((*row_names, "*")),
            rng.choice((*key_names, "*", key_names)),
            rng.choice((*row_names, "*")),
        ]
        options["head_gain"] = fb.HeadGain(*names[:2], span=0.75, floor=0.5, norm=norm, apply_to=names[2])
    if rng.random() < 0.5:
        owner = [rng.randint(0, 1) for _ in key_names]
        options["groups"] = {
            f"g{g}": [n for n, o in zip(key_names, owner, strict=True) if o == g] for g in (1, 0)
        }
        if rng.random() < 0.7:
            options["gates"] = {"g1": rng.choice((0.75, random_tensor(rng.choice((1, B)), M).float()))}
    if rng.random() < 0.4:
        contrast = fb.Contrast(1.75, rng.choice((None, (0.0, 1.0), (0.125, 0.375))))
        options["contrast"] = rng.choice(
            (contrast, {rng.choice(list(options.get("groups") or ["all"])): contrast})
        )
    if rng.random() < 0.4:
        name = rng.choice(key_names)
        most = [s[key_names.index(name)] for s in key_sizes]
        options["valid"] = {name: torch.tensor([rng.randint(0, n) for n in most])}
    scale = rng.choice((None, 0.3, random_tensor(B).float(), random_tensor(B, heads).float()))
    source: dict = {}
    if indexed:
        index = lambda t: torch.tensor([rng.randrange(t.shape[0]) for _ in range(B)])  # noqa: E731
        source = {"q": index(q), "k": [index(t) for t in k], "v": [index(t) for t in v]}
    mask = None
    if rng.random() < 0.3:
        mask = random_tensor(rng.choice((1, B)), rng.choice((1, heads)), M, N)
        mask = mask > -0.7 if rng.random() < 0.5 else torch.where(mask > 1, -math.inf, mask)
    return OracleCall(q, k, v, row_names, key_names, row_sizes, key_sizes, options, scale, source, mask)


def without_clip(call: OracleCall) -> OracleCall:
    """Where the call has a contrast, makes it an unclipped one and drops the mask, for `composed`."""
    if "contrast" in call.options:
        call.options["contrast"] = fb.Contrast(1.75, None)
        call.mask = None
    return call


def to_segments(names: list[str], sizes: list[list[int]]) -> fb.Segments:
    """sizes: (batch, segments)"""
    if all(s == sizes[0] for s in sizes):
        return fb.Segments(dict(zip(names, sizes[0], strict=True)))
    return fb.Segments({n: torch.tensor([s[i] for s in sizes]) for i, n in enumerate(names)})


def library_arguments(call: OracleCall) -> tuple[tuple, dict]:
    """(q, k, v, control) and the keyword arguments of fb.attention."""
    rows, keys = to_segments(call.row_names, call.row_sizes), to_segments(call.key_names, call.key_sizes)
    k, v = (t[0] if len(t) == 1 else t for t in (call.k, call.v))
    kwargs = {"scale": call.scale, "source": dict(call.source) or None, "mask": call.mask}
    return (call.q, k, v, fb.Control(rows, keys, **call.options)), kwargs


def library_attention(call: OracleCall, backend: str = "reference", **more):
    positional, named = library_arguments(call)
    return fb.attention(*positional, **named, backend=backend, **more)


def map_arguments(call: OracleCall) -> tuple:
    """(q, k, lse, control, keyword arguments) of column_mass() and key_probabilities(): without a mask."""
    (q, k, v, control), kwargs = library_arguments(call)
    kwargs.pop("mask")
    lse = fb.attention(q, k, v, control, **kwargs, backend="reference", return_stats=True)[1].lse
    if kwargs["source"]:
        kwargs["source"].pop("v")
    return q, k, lse, control, kwargs

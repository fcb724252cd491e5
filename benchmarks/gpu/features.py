"""Every feature of attention as one call on random inputs, for the checks on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...bindings import Contrast, HeadGain
from ..cases.float64_check import FeatureCall
from ..cases.inputs import Sampler

ROWS = {"prompt": 33, "subject": 70, "target": 150}
TOKENS = sum(ROWS.values())
SHIFT = {("target", "prompt"): 1.3, ("target", "subject"): 1.3}


class FeatureSampler(Sampler):
    """Random tensors of one dtype, head dim, batch and number of heads.

    Args:
        seed: as in Sampler.
        dtype: as in Sampler.
        device: as in Sampler.
        dim: head dim.
        batch: items.
        heads: of q, and of k and v unless they are grouped.
    """

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        dim: int,
        batch: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__(seed, dtype, device)
        self.dim, self.batch, self.heads = dim, batch, heads

    def tokens(self, count: int, heads: int | None = None, batch: int | None = None) -> Tensor:
        """(batch, count, heads, dim)."""
        return self.normal(
            self.batch if batch is None else batch, count, self.heads if heads is None else heads, self.dim
        )

    def call(
        self, rows: dict | None = None, keys: dict | None = None, kv_heads: int | None = None, **options: Any
    ) -> FeatureCall:
        """A call with these segments and options of Control.

        Heads differ in how much they attend to the first keys; otherwise a gain derived from that mass would
        magnify its rounding.
        """
        rows = ROWS if rows is None else rows
        keys = rows if keys is None else keys
        q, k = self.tokens(_total(rows)) + self.dim**-0.25, self.tokens(_total(keys), kv_heads)
        first = int(torch.as_tensor(next(iter(keys.values()))).max())
        k[:, :first] += torch.linspace(-1, 1, k.shape[2], device=self.device)[:, None].to(k) * self.dim**-0.25
        return FeatureCall(q, k, self.tokens(_total(keys), kv_heads), rows, keys, options)


Feature = Callable[[FeatureSampler], FeatureCall]


def _total(lengths: dict) -> int:
    return int(sum(torch.as_tensor(n).flatten()[0] for n in lengths.values()))


def _plain(s: FeatureSampler) -> FeatureCall:
    q, k, v = (s.tokens(TOKENS) for _ in "qkv")
    return FeatureCall(q, k, v, {"all": TOKENS}, {"all": TOKENS})


def _head_gain(norm: Any) -> Feature:
    rule = HeadGain(rows="target", keys="prompt", norm=norm, span=0.3, apply_to=["subject", "target"])
    return lambda s: s.call(head_gain=rule, gain={"target": 0.5})


def _removed_keys(s: FeatureSampler) -> FeatureCall:
    """The removed keys and values hold NaN."""
    call = s.call(bias={("*", "subject"): -math.inf, ("target", "prompt"): 1.5})
    for t in (call.k, call.v):
        assert isinstance(t, Tensor)
        t[:, 33:103] = float("nan")
    return call


def _tables_per_item_and_head(s: FeatureSampler) -> FeatureCall:
    """Tensors in every table, and rows without an allowed key in one of their groups."""
    return s.call(
        bias={("*", "prompt"): s.float32(s.batch, s.heads), ("prompt", "subject"): -math.inf},
        weight={("target", "*"): s.float32(s.batch, s.heads).abs(), ("subject", "target"): 0.0},
        gain={"subject": s.float32(s.heads)},
        groups={"a": ["subject"], "b": ["prompt", "target"]},
    )


def _groups_and_gates(s: FeatureSampler) -> FeatureCall:
    groups = {"image": ["subject", "target"], "text": ["prompt"]}
    gates = {"image": s.uniform(s.batch, TOKENS), "text": 0.7}
    return s.call(groups=groups, gates=gates, weight={("*", "subject"): 1.4})


def _contrast(clip: tuple[float, float] | None) -> Feature:
    return lambda s: s.call(contrast=Contrast(1.67, clip))


def _contrast_of_a_group(s: FeatureSampler) -> FeatureCall:
    return s.call(
        groups={"text": ["prompt"], "image": ["subject", "target"]},
        contrast={"image": Contrast(2.0, (0.0, 0.1))},
        weight={("target", "subject"): 1.3},
    )


def _valid_keys(s: FeatureSampler) -> FeatureCall:
    counts = {"prompt": [7, 33], "target": [150, 64]}
    return s.call(valid={name: torch.tensor(n, device=s.device) for name, n in counts.items()})


def _lengths_per_item(s: FeatureSampler) -> FeatureCall:
    first = torch.tensor([20, 121])
    lengths = {"prompt": first, "subject": 203 - first, "target": 50}
    return s.call(lengths, lengths, weight={("target", "prompt"): 1.3, ("subject", "*"): 0.6})


def _source(s: FeatureSampler) -> FeatureCall:
    """As SD-VICL: output items read queries, keys and values of other items."""
    index = {"q": torch.tensor([2, 0, 1]), "k": torch.tensor([0, 0, 2]), "v": torch.tensor([1, 0, 2])}
    s.batch = 3
    return replace(
        s.call(weight={("target", "prompt"): 1.3}), source={n: i.to(s.device) for n, i in index.items()}
    )


def _key_lists(s: FeatureSampler) -> FeatureCall:
    """A tensor for each key segment, with different strides; one of them serves all items."""
    call = s.call(weight={("target", "reference"): 1.2}, keys={"text": 40, "reference": 130, "own": TOKENS})
    keys = [s.normal(s.batch, s.heads, 40, s.dim).transpose(1, 2), s.tokens(130, batch=1), s.tokens(TOKENS)]
    values = [s.tokens(40), s.normal(1, 130, s.heads, s.dim + 8)[..., : s.dim], s.tokens(TOKENS)]
    return replace(call, k=keys, v=values)


def _strides(s: FeatureSampler) -> FeatureCall:
    """q, k and v are transposed views of one tensor."""
    call = s.call(weight={("target", "prompt"): 1.3})
    q, k, v = (s.normal(3, s.batch, s.heads, TOKENS, s.dim)[i].transpose(1, 2) for i in range(3))
    return replace(call, q=q, k=k, v=v)


def _grouped_queries(s: FeatureSampler) -> FeatureCall:
    return s.call(kv_heads=2, weight={("target", "prompt"): 1.3}, head_gain=HeadGain())


def _few_rows(s: FeatureSampler) -> FeatureCall:
    """Five rows, and empty segments."""
    return s.call(
        {"target": 5, "empty": 0}, {"prompt": 77, "none": 0, "image": 300}, weight={("target", "image"): 0.4}
    )


def _scale_per_head(s: FeatureSampler) -> FeatureCall:
    """A scale for each item and head, one of them negative."""
    scale = (0.5 + s.uniform(s.batch, s.heads)) * s.dim**-0.5
    scale[0, 0] *= -1
    return replace(s.call(weight={("target", "prompt"): 1.3}), scale=scale)


def _one_token_segments(s: FeatureSampler) -> FeatureCall:
    """As Prompt-to-Prompt: each of 77 tokens is a key segment with a weight of its own."""
    keys = {f"word_{i}": 1 for i in range(77)}
    weight = {("image", word): 0.5 + i / 76 for i, word in enumerate(keys)}
    return s.call({"image": 200}, keys, weight=weight)


FEATURES: dict[str, Feature] = {
    "plain": _plain,
    "shift": lambda s: s.call(weight=SHIFT),
    "brush": lambda s: s.call(weight=SHIFT, head_gain=HeadGain()),
    "gain by mean": _head_gain("mean"),
    "gain by max": _head_gain("max"),
    "gain by softmax": _head_gain("softmax"),
    "removed keys": _removed_keys,
    "tables per item and head": _tables_per_item_and_head,
    "groups and gates": _groups_and_gates,
    "contrast, clipped": _contrast((0.0, 1.0)),
    "contrast, linear": _contrast(None),
    "contrast of a group": _contrast_of_a_group,
    "valid keys": _valid_keys,
    "lengths per item": _lengths_per_item,
    "source": _source,
    "key lists": _key_lists,
    "strides": _strides,
    "grouped queries": _grouped_queries,
    "few rows": _few_rows,
    "scale per head": _scale_per_head,
    "one-token segments": _one_token_segments,
}
DIFFERENTIABLE = (
    "plain",
    "shift",
    "brush",
    "removed keys",
    "tables per item and head",
    "groups and gates",
    "valid keys",
    "source",
    "key lists",
    "strides",
    "grouped queries",
    "few rows",
    "one-token segments",
)


def draw_feature(name: str, dtype: torch.dtype, dim: int, device: torch.device | str) -> FeatureCall:
    """A feature's call; the name decides its random numbers."""
    seed = sum(ord(letter) for letter in name)
    return FEATURES[name](FeatureSampler(seed, dtype, device, dim))

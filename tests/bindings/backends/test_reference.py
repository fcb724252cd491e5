"""The reference backend, and `composed`, equal the oracle's loops over the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from support import oracle
from support.oracle_calls import library_attention, random_oracle_call, without_clip


def assert_close(got: Tensor, expected, tolerance: float) -> None:
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(120))
def test_reference_equals_the_oracle(seed: int) -> None:
    call = random_oracle_call(seed)
    truth = oracle.attention(call)
    out, stats = library_attention(call, return_stats=True)
    # The drawn tables hold float32 numbers, so that both sides compute from the same ones.
    assert_close(out, truth.out, 3e-7)
    assert_close(stats.lse, truth.lse, 1e-12)
    assert_close(stats.mass, truth.mass, 1e-12)
    assert_close(stats.gain, truth.gain, 1e-8)  # minmax divides by max - min + 1.2e-7


def test_random_oracle_calls_have_every_feature() -> None:
    """Each feature several times: the comparisons with the oracle prove no more than the calls they draw."""
    calls = [random_oracle_call(seed) for seed in range(120)]
    for name in ("bias", "weight", "gain", "head_gain", "groups", "gates", "contrast", "valid"):
        assert sum(name in s.options for s in calls) >= 15, name
    assert {s.options["head_gain"].norm for s in calls if "head_gain" in s.options} == {
        "minmax",
        "mean",
        "max",
        "softmax",
    }
    clips = [c.clip for s in calls if isinstance(c := s.options.get("contrast"), fb.Contrast)]
    assert clips.count(None) >= 3 and len(clips) - clips.count(None) >= 6
    for name, present in (
        ("lists", [len(s.k) > 1 for s in calls]),
        ("sources", [bool(s.source) for s in calls]),
        ("masks", [s.mask is not None for s in calls]),
        ("rows by item", [any(x != s.row_sizes[0] for x in s.row_sizes) for s in calls]),
        ("keys by item", [any(x != s.key_sizes[0] for x in s.key_sizes) for s in calls]),
        ("scales by item", [isinstance(s.scale, Tensor) for s in calls]),
        ("grouped queries", [s.q.shape[2] > s.k[0].shape[2] for s in calls]),
        (
            "rows without a key",
            [bool(torch.isinf(library_attention(s, return_stats=True)[1].lse).any()) for s in calls],
        ),
    ):
        assert sum(present) >= 8, name


@pytest.mark.parametrize("seed", range(40))
def test_composed_equals_the_oracle(seed: int) -> None:
    call = without_clip(random_oracle_call(seed + 1000))
    truth = oracle.attention(call)
    out, stats = library_attention(call, backend="composed", return_stats=True)
    assert_close(out, truth.out, 1e-6)
    assert_close(stats.lse, truth.lse, 1e-6)
    assert_close(stats.mass, truth.mass, 1e-6)
    assert_close(stats.gain, truth.gain, 1e-5)

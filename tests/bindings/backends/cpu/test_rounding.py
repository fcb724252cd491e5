"""Long float32 sums of the C++ backend against float64, with bounds from a count of roundings."""

from __future__ import annotations

import torch

import flashbrush as fb
from support.rounding import ROUNDING, cpu_attention, positive_sum

TOKENS = 5120


def check(got: torch.Tensor, truth: torch.Tensor, variance: float) -> None:
    error = float((got.double() / truth - 1).square().mean().sqrt())
    assert error <= 1.4 * ROUNDING * variance**0.5, f"{error / ROUNDING:.2f} roundings of {variance**0.5:.2f}"


def test_column_mass_over_many_rows(isa: str) -> None:
    q, k = torch.randn(1, TOKENS, 1, 64), torch.randn(1, 64, 1, 64)
    scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()) / 8
    lse = scores.logsumexp(-1).float()
    truth = (scores - lse.double()[..., None]).exp().sum(2)
    # Over a tile of 128 rows in 4 lanes or more, over 40 tiles, over lanes. A logit minus lse is rounded at 2
    # to 8 times the unit of its exponential, in 5,120 terms; its factor scale * log2(e) alike in all.
    check(fb.column_mass(q, k, lse[..., None]), truth, positive_sum(32, TOKENS // 128, 4) + 4)


def test_values_of_a_segment(isa: str) -> None:
    """The unclipped contrast takes beta of the attention and 1 - beta of the mean value."""
    beta = 1.67
    for rows in (33, 64):  # K and V as they lie, and packed
        q, k, v = torch.randn(1, rows, 1, 64), torch.randn(1, TOKENS, 1, 64), torch.rand(1, TOKENS, 1, 64)
        control = fb.Control(
            fb.Segments(rows=rows), fb.Segments(keys=TOKENS), contrast=fb.Contrast(beta, None)
        )
        truth = fb.attention(q.double(), k.double(), v.double(), control, backend="reference")
        mean = positive_sum(128, TOKENS // 128) + 3
        variance = beta**2 * cpu_attention(TOKENS) + (beta - 1) ** 2 * mean + 1
        check(fb.attention(q, k, v, control, backend="cpu"), truth, variance)

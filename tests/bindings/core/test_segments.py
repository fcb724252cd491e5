"""Segments: lengths, slices, and the permutation that sorts interleaved labels."""

from __future__ import annotations

import pytest
import torch

import flashbrush as fb


def test_slices_follow_each_other() -> None:
    segments = fb.Segments(prompt=4, empty=0, image=5)
    assert segments.names == ("prompt", "empty", "image") and segments.total == 9 and len(segments) == 3
    assert [segments.slice(n) for n in segments.names] == [slice(0, 4), slice(4, 4), slice(4, 9)]


@pytest.mark.parametrize("batch", [None, 3], ids=["shared", "per item"])
def test_from_labels_sorts_stably_and_back(batch: int | None) -> None:
    """Tokens of a segment keep their order; the inverse undoes the permutation."""
    shape = (50,) if batch is None else (batch, 50)
    labels = torch.randint(0, 3, shape)
    segments, permutation, inverse = fb.Segments.from_labels(labels, ["a", "b", "c"])
    assert permutation.shape == inverse.shape == shape
    for b, (row, order, back) in enumerate(
        zip(*(t.reshape(-1, 50) for t in (labels, permutation, inverse)), strict=True)
    ):
        expected = [i for label in range(3) for i in range(50) if row[i] == label]
        assert order.tolist() == expected
        assert torch.equal(order[back], torch.arange(50))
        lengths = segments.lengths if segments.items is None else segments.items[b].tolist()
        assert list(lengths) == torch.bincount(row, minlength=3).tolist()


def test_labels_that_agree_in_every_item_give_fixed_lengths() -> None:
    labels = torch.tensor([[1, 0, 1], [0, 1, 1]])
    segments = fb.Segments.from_labels(labels, ["a", "b"])[0]
    assert segments.items is None and segments.lengths == (1, 2) and segments.total == 3

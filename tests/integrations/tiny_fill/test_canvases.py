"""The tiny model's training data: reproducible by seed, true to its kind, drawn at the given pose."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from flashbrush.integrations.tiny_fill.data.canvases import KINDS, SIDE, Canvases, canvases
from flashbrush.integrations.tiny_fill.data.photos import HELD_OUT, TRAINING, photos
from flashbrush.integrations.tiny_fill.data.subjects import ANGLES, draw, subjects
from flashbrush.integrations.tiny_fill.data.words import COLOURS, SHAPES, TEXT_TOKENS, tokenizer, vocabulary


def made(kind: str, count: int = 24, freedom: float = 1.0, seed: int = 0) -> Canvases:
    return canvases(count, photos(), Generator().manual_seed(seed), freedom, kind)


def test_a_seed_gives_the_same_canvases() -> None:
    first, again, other = (canvases(8, photos(), Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.pictures, again.pictures) and first.prompts == again.prompts
    assert not torch.equal(first.pictures, other.pictures)
    assert abs(sum(KINDS.values()) - 1) < 1e-9 and not set(TRAINING) & set(HELD_OUT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_covers_its_subject_within_one_panel(kind: str) -> None:
    some = made(kind)
    assert (
        some.pictures.shape == (24, 3, 2 * SIDE, SIDE)
        and some.pictures.min() >= 0
        and some.pictures.max() <= 1
    )
    assert set(some.masks.unique().tolist()) == {0.0, 1.0}
    assert ((some.coverage > 0.05) & (some.masks == 0)).sum() == 0
    share = some.masks.mean((1, 2, 3))
    assert share.min() > 0.03 and share.max() < 0.5
    upper, lower = some.masks[:, :, :SIDE].sum(), some.masks[:, :, SIDE:].sum()
    assert (upper > 0) == (kind == "above") and (lower > 0) == (kind != "above")


def test_each_kind_is_as_described() -> None:
    aligned = made("reference", freedom=0.0)
    both = aligned.coverage[:, :, SIDE:] == 1  # elsewhere the background is blended in
    upper, lower = aligned.pictures[:, :, :SIDE], aligned.pictures[:, :, SIDE:]
    torch.testing.assert_close((upper * both), (lower * both), atol=1e-5, rtol=0)
    assert any(text == "" for text in aligned.prompts) and any(text for text in aligned.prompts)
    recoloured = made("contradiction", freedom=0.0)
    differ = (recoloured.pictures[:, :, :SIDE] - recoloured.pictures[:, :, SIDE:]).abs().amax((1, 2, 3))
    assert differ.min() > 0.05
    for text, colour in zip(recoloured.prompts, recoloured.subjects.colour.tolist(), strict=True):
        assert list(COLOURS)[colour] in text
    blank, nothing = made("blank"), made("nothing")
    assert (blank.pictures[:, :, :SIDE] == 1).all() and all(blank.prompts)
    assert set(nothing.prompts) == {"nothing"} and not nothing.coverage.any()
    assert len(set(made("stranger").prompts)) > 10


def test_freedom_moves_the_subject() -> None:
    def middle(coverage: torch.Tensor) -> torch.Tensor:
        axis = torch.arange(SIDE) + 0.5
        total = coverage.sum((1, 2, 3))
        return (
            torch.stack([(coverage.sum((1, 2)) * axis).sum(1), (coverage.sum((1, 3)) * axis).sum(1)], 1)
            / total[:, None]
        )

    fixed, free = (made("reference", freedom=freedom) for freedom in (0.0, 1.0))
    moved = (middle(free.coverage[:, :, SIDE:]) - middle(fixed.coverage[:, :, SIDE:])).abs()
    assert 1.5 < moved.mean() < 5 and moved.max() < 9
    assert torch.equal(fixed.pictures[:, :, :SIDE], free.pictures[:, :, :SIDE])


def test_every_shape_is_drawn_at_its_place_size_and_angle() -> None:
    some = subjects(130, photos(), Generator().manual_seed(0))
    assert {SHAPES[i] for i in some.shape.tolist()} == set(SHAPES)
    assert some.outline.shape == (130, ANGLES)
    torch.testing.assert_close(some.outline.amax(1), torch.ones(130))
    n = len(some)
    colours, coverage = draw(some, torch.full((n, 2), 32.0), torch.full((n,), 20.0), torch.zeros(n), SIDE)
    assert colours.isfinite().all() and colours.min() >= 0 and colours.max() <= 1
    axis = torch.arange(SIDE) + 0.5 - 32
    radius = (axis[:, None] ** 2 + axis**2).sqrt()
    reach = torch.where(coverage[:, 0] > 0.5, radius, 0).amax((1, 2))
    assert (reach > 17).all() and (reach < 21.5).all()
    circles = some.shape == SHAPES.index("circle")
    areas = coverage[circles].sum((1, 2, 3))
    torch.testing.assert_close(areas, torch.full_like(areas, torch.pi * 400), rtol=0.01, atol=0)
    quarter = torch.full((n,), torch.pi / 2)
    turned, over = draw(some, torch.full((n, 2), 32.0), torch.full((n,), 20.0), quarter, SIDE)
    torch.testing.assert_close(over.rot90(1, (2, 3)), coverage, atol=2e-3, rtol=0)
    torch.testing.assert_close((turned * over).rot90(1, (2, 3)), colours * coverage, atol=5e-2, rtol=0)


def test_prompts_fit_the_tokenizer() -> None:
    words, known = tokenizer(), vocabulary()
    for text in {*subjects(300, photos(), Generator().manual_seed(1)).prompts(), "nothing"}:
        ids = words(text).input_ids
        assert len(ids) <= TEXT_TOKENS and known["<unk>"] not in ids
        assert not any(token.startswith("##") for token in words.convert_ids_to_tokens(ids)), text

"""PersonalizeAnythingPipeline on a tiny random FLUX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data

from flashbrush.integrations import PersonalizeAnything, PersonalizeAnythingPipeline, PersonalSubject
from flashbrush.integrations.pipelines import PersonalizeAnythingOutput


@pytest.fixture(scope="module")
def pipe(flux_checkpoint: Path) -> PersonalizeAnythingPipeline:
    return PersonalizeAnythingPipeline.from_pretrained(flux_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.chelsea()).resize((64, 48))


OPTIONS = {"steps": 4, "seed": 0, "progress": False, "width": 64, "height": 48}
TOKENS = [8 * row + column for row in (1, 2, 3) for column in (2, 3, 4)]  # 8 x 8 pixels each


def subjects(result: PersonalizeAnythingOutput) -> tuple[PersonalSubject, ...]:
    """The method's subjects, a tuple."""
    assert isinstance(result.method.subjects, tuple)
    return result.method.subjects


def test_move_sets_the_target_and_every_input_changes_the_result(
    pipe: PersonalizeAnythingPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    here, again = (pipe("a red moon", photo, mask, **OPTIONS) for _ in range(2))
    assert torch.equal(here.latents, again.latents) and here.image.size == (64, 48) and here.seed == 0
    there = pipe("a red moon", photo, mask, move=(8, 16), **OPTIONS)
    (first,), (second,) = subjects(here), subjects(there)
    device = torch.device("cpu")
    assert first.tokens(True, device).tolist() == first.tokens(False, device).tolist() == TOKENS
    assert second.tokens(True, device).tolist() == [n + 8 + 2 for n in TOKENS]
    for other in (
        there,
        pipe(
            "a red moon",
            photo,
            mask,
            method=PersonalizeAnything(PersonalSubject(torch.ones(1, 1).bool()), tau=1.0),
            **OPTIONS,
        ),
        pipe("a green star", photo, mask, **OPTIONS),
        pipe("a red moon", photo.rotate(180), mask, **OPTIONS),
        pipe("a red moon", photo, mask, **OPTIONS | {"seed": 1}),
    ):
        assert float((other.latents - here.latents).abs().max()) > 1e-4


def test_without_replacement_the_photo_has_no_effect(
    pipe: PersonalizeAnythingPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    off = PersonalizeAnything(PersonalSubject(torch.ones(1, 1).bool()), tau=1.0)
    one, other = (pipe("a red moon", p, mask, method=off, **OPTIONS) for p in (photo, photo.rotate(180)))
    torch.testing.assert_close(one.latents, other.latents)


def test_each_subject_has_its_own_batch_item(
    pipe: PersonalizeAnythingPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    seen: list[int] = []
    hook = pipe.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        result = pipe(
            "a red moon", [photo, photo.rotate(180)], [mask, mask], move=[(0, 0), (8, 24)], **OPTIONS
        )
    finally:
        hook.remove()
    assert seen == [3] * 4 and [s.item for s in subjects(result)] == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"move": (3, 0)}, "move: expected .pixels down, pixels to the right., multiples of 8"),
        ({"move": (0, 48)}, "it leaves the 6 x 8 tokens"),
        ({"mask": []}, "mask: expected 1, one for each subject, got 0"),
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"seed": -1}, "seed"),
    ],
    ids=["move", "too far", "masks", "steps", "seed"],
)
def test_wrong_input_raises(
    wrong: dict, said: str, pipe: PersonalizeAnythingPipeline, photo: Image.Image, mask: Image.Image
) -> None:
    with pytest.raises(ValueError, match=said):
        pipe("a red moon", photo, wrong.pop("mask", mask), **OPTIONS | wrong)

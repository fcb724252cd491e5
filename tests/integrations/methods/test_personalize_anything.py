"""Personalize Anything against an eager implementation that writes tokens one by one and joins keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashbrush.integrations import PersonalizeAnything, PersonalSubject
from flashbrush.integrations.diffusers import Layer, Step, apply
from flashbrush.integrations.methods.personalize_anything import noised
from flashbrush.integrations.methods.shared.token_masks import moved

from ..diffusers.tiny_images import sd3_call, tiny_sd3
from ..tiny import COLUMNS, ROWS, TEXT, forward, relative, tiny_call, tiny_flux
from .eager import FluxCore, Rope, Site, attend, eagerly, rotate, sample_euler, worst_layer

TOLERANCE = 1e-5  # float32, relative to the largest output
TIMES = (0.9, 0.65, 0.4, 0.2, 0.0)
MASK = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
MASK[1:4, :2] = MASK[0, 2] = True
ONE = PersonalSubject(MASK, moved(MASK, 2, 1))
TWO = (PersonalSubject(MASK), PersonalSubject(~MASK & (torch.arange(COLUMNS) > 2), None, 1))
CPU = torch.device("cpu")


class EagerPersonal(FluxCore):
    """`pairs`: [(item, [(token of the reference, token of the target), ...]), ...]."""

    def __init__(self, pairs: list, concatenation: str, replace: bool = True) -> None:
        self.pairs, self.concatenation, self.replace = pairs, concatenation, replace

    def states(self, site: Site, image: Tensor) -> Tensor:
        image = image.clone()
        if self.replace:
            for item, tokens in self.pairs:
                for source, target in tokens:
                    image[-1, target] = image[item, source]
        return image

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        assert rope is not None
        plain = attend(rotate(q, rope), rotate(k, rope), v)
        if self.concatenation == "none" or (self.concatenation == "zero" and self.replace):
            return plain
        keys, values = [], []
        for item, tokens in self.pairs:
            targets = torch.tensor(sorted(target for _, target in tokens))
            sources = torch.tensor(sorted(source for source, _ in tokens))
            there = tuple(t[TEXT + targets] for t in rope)
            more = k[item, :, TEXT + sources]
            keys.append(rotate(more, there) if self.concatenation == "target" else more)
            values.append(v[item, :, TEXT + sources])
        joined = (
            torch.cat([own, *(t.expand(len(k), -1, -1, -1) for t in more)], 2)
            for own, more in ((rotate(k, rope), keys), (v, values))
        )
        out = attend(rotate(q, rope), *joined)
        return out if self.concatenation == "target" else torch.cat([plain[:-1], out[-1:]])


def eager(method: PersonalizeAnything, step: int = 0, replace: bool = True) -> EagerPersonal:
    pairs = []
    for subject in method.subjects:  # type: ignore[union-attr]
        sources = subject.shuffled(method.shuffle, method.seed, step, CPU).tolist()
        target = subject.mask if subject.target is None else subject.target
        pairs.append(
            (subject.item, list(zip(sources, target.flatten().nonzero()[:, 0].tolist(), strict=True)))
        )
    return EagerPersonal(pairs, method.concatenation, replace)


CASES = {
    "released": (2, ONE, {}),
    "in place": (2, PersonalSubject(MASK), {}),
    "two subjects": (3, TWO, {}),
    "shuffled": (2, ONE, {"shuffle": 3, "seed": 4}),
    "concatenated": (2, ONE, {"concatenation": "target"}),
    "two concatenated": (3, TWO, {"concatenation": "target"}),
    "concatenated at zero": (2, ONE, {"concatenation": "zero"}),
    "two concatenated at zero": (3, TWO, {"concatenation": "zero"}),
}


@pytest.mark.parametrize("replace", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_matches_eager(case: str, replace: bool) -> None:
    batch, subjects, knobs = CASES[case]
    model, method = tiny_flux(), PersonalizeAnything(subjects, **knobs)
    call = tiny_call(model, batch=batch)
    core = eager(method, 2, replace)
    with eagerly(model, core):
        expected = forward(model, call)
    with apply(model, method) as handle:
        handle.set_step(2, sigma=0.51 if replace else 0.5)
        assert worst_layer(model, call, core) <= TOLERANCE
        assert relative(forward(model, call), expected) <= TOLERANCE


@pytest.mark.parametrize("case", ["released", "shuffled", "concatenated", "concatenated at zero"])
def test_run_matches_eager(case: str) -> None:
    """Two steps with replacement, two without; the reference is noised on a straight line."""
    _, subject, knobs = CASES[case]
    model, method = tiny_flux(), PersonalizeAnything(subject, **knobs)
    call = tiny_call(model, batch=2)
    noise, photo = (
        call["hidden_states"],
        torch.randn(1, ROWS * COLUMNS, 8, generator=torch.Generator().manual_seed(9)),
    )

    def by_hand(step: int, latents: Tensor) -> Tensor:
        core.__dict__.update(eager(method, step, step < 2).__dict__)
        latents = latents.clone()
        latents[0] = photo[0] + TIMES[step] * (noise[0] - photo[0])
        return latents

    def ours(step: int, latents: Tensor) -> Tensor:
        handle.set_step(step, 4, TIMES[step])
        return torch.cat([noised(photo, noise[:1], TIMES[step]), latents[1:]])

    core = eager(method)
    with eagerly(model, core):
        expected = list(sample_euler(model, call, noise, TIMES, by_hand))
    with apply(model, method) as handle:
        mine = list(sample_euler(model, call, noise, TIMES, ours))
    assert all(relative(a, b) <= TOLERANCE for a, b in zip(mine, expected, strict=True))


def outcome(knobs: dict, step: Step, batch: int = 2) -> Tensor:
    model = tiny_flux()
    call = tiny_call(model, batch=batch)
    with apply(model, PersonalizeAnything(**{"subjects": ONE} | knobs)) as handle:
        handle.set_step(step.index, step.count, step.sigma)
        return forward(model, call)


@pytest.mark.parametrize(
    ("knob", "step"),
    [
        ({"subjects": PersonalSubject(MASK)}, Step(0, 4, 0.6)),
        ({"tau": 0.7}, Step(0, 4, 0.6)),
        ({"share": 0.1}, Step(1, 4)),
        ({"shuffle": 3}, Step(0, 4, 0.6)),
        ({"shuffle": 3, "seed": 1}, Step(0, 4, 0.6)),
        ({"concatenation": "target"}, Step(0, 4, 0.6)),
        ({"concatenation": "target"}, Step(0, 4, 0.4)),
        ({"concatenation": "zero"}, Step(0, 4, 0.4)),
    ],
    ids=str,
)
def test_each_knob_changes_the_generation_only(knob: dict, step: Step) -> None:
    before, after = outcome({}, step), outcome(knob, step)
    assert relative(after[1], before[1]) > 100 * TOLERANCE
    if knob.get("concatenation") != "target":
        assert relative(after[0], before[0]) <= TOLERANCE


def test_seed_and_step_change_the_shuffle() -> None:
    draws = {tuple(ONE.shuffled(3, seed, step, CPU).tolist()) for seed in range(3) for step in range(3)}
    assert len(draws) > 5


def test_late_steps_are_plain_attention() -> None:
    model = tiny_flux()
    call = tiny_call(model, batch=2)
    plain = forward(model, call)
    for step in (Step(0, 10, 0.5), Step(8, 10)):
        assert relative(outcome({}, step), plain) <= TOLERANCE
    for step in (Step(0, 10, 0.51), Step(7, 10)):
        assert relative(outcome({}, step), plain) > 100 * TOLERANCE


def test_same_image_twice_is_plain_attention() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    twice = {name: t.repeat(2, *[1] * (t.dim() - 1)) if "ids" not in name else t for name, t in call.items()}
    with apply(model, PersonalizeAnything(PersonalSubject(MASK))) as handle:
        handle.set_step(0, sigma=1.0)
        out = forward(model, twice)
    assert relative(out[1:], forward(model, call)) <= TOLERANCE


# Functions beside the method


def test_shuffle_stays_within_windows() -> None:
    mask = torch.rand(9, 12, generator=torch.Generator().manual_seed(2)) > 0.3
    subject = PersonalSubject(mask)
    tokens = mask.flatten().nonzero()[:, 0]
    assert torch.equal(subject.shuffled(1, 0, 0, CPU), tokens)
    shuffled = subject.shuffled(3, 0, 0, CPU)
    assert torch.equal(shuffled.sort().values, tokens) and not torch.equal(shuffled, tokens)
    for a, b in zip(tokens.tolist(), shuffled.tolist(), strict=True):
        assert (a // 12 // 3, a % 12 // 3) == (b // 12 // 3, b % 12 // 3)


def test_noised_interpolates_between_source_and_noise() -> None:
    photo, noise = torch.randn(2, 3, 4)
    assert torch.equal(noised(photo, noise, 0), photo) and torch.equal(noised(photo, noise, 1), noise)
    torch.testing.assert_close(noised(photo, noise, 0.25), photo + 0.25 * (noise - photo))


# Errors


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("subjects", ()),
        ("subjects", None),
        ("subjects", (MASK,)),
        ("subjects", (ONE, PersonalSubject(MASK.T))),
        ("tau", 1.1),
        ("tau", "0.5"),
        ("share", -0.1),
        ("share", float("nan")),
        ("shuffle", 0),
        ("seed", -1),
        ("concatenation", "all"),
    ],
)
def test_wrong_knob_raises(knob: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{knob}: "):
        PersonalizeAnything(**{"subjects": ONE} | {knob: value})
    method = PersonalizeAnything(ONE)
    with pytest.raises(ValueError, match=f"^{knob}: "):
        setattr(method, knob, value)
    assert method == PersonalizeAnything(ONE)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"mask": MASK.float()}, "^mask: "),
        ({"mask": MASK.flatten()}, "^mask: "),
        ({"mask": MASK & False}, "^mask: "),
        ({"mask": MASK, "target": ~MASK}, "^target: expected 7 tokens"),
        ({"mask": MASK, "target": 3}, "^target: "),
        ({"mask": MASK, "target": MASK.T}, r"^target: expected 7 tokens of \(6, 4\)"),
        ({"mask": MASK, "item": -1}, "^item: "),
    ],
)
def test_wrong_subject_raises(fields: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PersonalSubject(**fields)


@pytest.mark.parametrize(
    ("batch", "image", "step", "match"),
    [
        (1, 24, Step(0, 4), "^subjects: expected items before the last, 0"),
        (2, 23, Step(0, 4), "^subjects: masks of 24 tokens, but the call has 23"),
        (2, 24, Step(0), "^tau: neither the step's sigma is known"),
    ],
)
def test_call_that_does_not_fit_raises(batch: int, image: int, step: Step, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PersonalizeAnything(ONE).plan(Layer(0, "double", None, 4, 32, TEXT, image, batch), step)


def test_other_model_raises() -> None:
    model = tiny_sd3()
    with apply(model, PersonalizeAnything(ONE)), pytest.raises(ValueError, match="expected FLUX"):
        model(**sd3_call(batch=2))

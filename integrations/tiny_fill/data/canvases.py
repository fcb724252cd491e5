"""Training examples of the tiny model: diptychs with a hole, their prompts, and the whole pictures.

The task is inpainting, as for FLUX Fill: the content of the hole follows from the rest of the canvas and from
the prompt. KINDS are the ways in which they determine it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .photos import Photos
from .subjects import PHOTO, Subjects, draw, subjects

SIDE = 64  # pixels of a panel
# Shares of the kinds of examples.
KINDS = {
    "reference": 0.68,  # the upper panel shows the subject; the prompt names it, or is empty
    "contradiction": 0.1,  # the prompt names another colour than the upper panel shows, and the truth has it
    "blank": 0.08,  # the upper panel is empty; the prompt names the subject
    "stranger": 0.04,  # the upper panel shows another subject; the prompt names the one in the hole
    "nothing": 0.05,  # the hole shows only background, and the prompt is "nothing"
    "above": 0.05,  # the hole is in the upper panel
}
SHIFT = 4.0  # largest shift of the lower subject, pixels each way
TURN = 0.15  # largest turn of the lower subject in radians, and largest logarithm of its change of size
EMPTY = 0.3  # share of empty prompts where the other panel shows the subject


@dataclass(frozen=True)
class Canvases:
    """A batch of n diptychs, SIDE wide and 2 SIDE high.

    Attributes:
        pictures: the whole pictures, (n, 3, 2 SIDE, SIDE) in [0, 1].
        masks: 1 in the hole, (n, 1, 2 SIDE, SIDE).
        prompts: n texts.
        kinds: indices into KINDS, (n,).
        coverage: of the subject in the panel with the hole, (n, 1, 2 SIDE, SIDE) in [0, 1].
        subjects: the subjects in the panel with the hole.
        scenes: the lower panels' backgrounds, (n, 3, SIDE, SIDE).
    """

    pictures: Tensor
    masks: Tensor
    prompts: list[str]
    kinds: Tensor
    coverage: Tensor
    subjects: Subjects
    scenes: Tensor


def canvases(
    count: int, photos: Photos, generator: Generator, freedom: float | Tensor = 1.0, kind: str | None = None
) -> Canvases:
    """Random diptychs on the photos' device.

    Args:
        count: number of diptychs.
        photos: for backgrounds and textures.
        generator: of all random numbers.
        freedom: of the pose, 0 to 1, or (count,) of them. At 0 a subject has the same place, angle and size
            in both panels; at 1 it is shifted by up to SHIFT, and turned and resized by up to TURN.
        kind: one of KINDS, for all diptychs; None: random, with their shares.
    """
    device = photos.levels[0][0].device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(device)

    def is_kind(name: str) -> Tensor:
        return kinds == list(KINDS).index(name)

    shares = torch.tensor(list(KINDS.values()) if kind is None else [float(name == kind) for name in KINDS])
    kinds = torch.multinomial(shares, count, replacement=True, generator=generator).to(device)
    shown = subjects(count, photos, generator)
    plain = torch.where(is_kind("contradiction") & (shown.pattern == PHOTO), 0, shown.pattern)
    shown = replace(shown, pattern=plain)
    hidden = shown.where(is_kind("contradiction"), shown.recoloured(generator))
    hidden = hidden.where(is_kind("stranger"), subjects(count, photos, generator))
    white = torch.ones(count, 3, SIDE, SIDE, device=device)
    absent = is_kind("nothing") & (uniform() < 0.5) | is_kind("blank")

    size = uniform(low=14.0, high=24.0)
    place = _places(size, uniform(2), uniform())
    colours, above = draw(shown, place, size, torch.zeros(count, device=device), SIDE)
    above = above * ~absent[:, None, None, None]
    upper = torch.lerp(white, colours, above)
    hole_above = _holes(above, place, size, uniform(), uniform(2), uniform())

    freedom = torch.as_tensor(freedom, device=device).expand(count)
    size = size * (freedom * uniform(low=-TURN, high=TURN)).exp()
    place = place + freedom[:, None] * uniform(2, low=-SHIFT, high=SHIFT)
    colours, below = draw(hidden, place, size, freedom * uniform(low=-TURN, high=TURN), SIDE)
    behind = photos.crops(count, SIDE, generator)
    hole = _holes(below, place, size, uniform(), uniform(2), uniform())
    below = below * ~is_kind("nothing")[:, None, None, None]
    lower = torch.lerp(behind, colours, below)

    up = is_kind("above")[:, None, None, None]
    mask = torch.cat([hole_above * up, hole * ~up], 2)
    empty = uniform() < EMPTY
    prompts = [
        "nothing" if nothing else "" if empty_ and enough else words
        for words, empty_, enough, nothing in zip(
            hidden.prompts(),
            empty.tolist(),
            (is_kind("reference") | is_kind("above")).tolist(),
            is_kind("nothing").tolist(),
            strict=True,
        )
    ]
    coverage = torch.cat([above * up, below * ~up], 2)
    return Canvases(torch.cat([upper, lower], 2), mask, prompts, kinds, coverage, hidden, behind)


def _places(size: Tensor, where: Tensor, moved: Tensor) -> Tensor:
    """Centres of the subjects, (n, 2): the panel's middle, or anywhere with room for a shift."""
    room = (SIDE / 2 - size - SHIFT).clamp(min=0)[:, None]
    return SIDE / 2 + torch.where(moved[:, None] < 0.5, (2 * where - 1) * room, 0.0)


def _holes(
    coverage: Tensor, centre: Tensor, size: Tensor, form: Tensor, margin: Tensor, wide: Tensor
) -> Tensor:
    """Holes, each a box, a disc or an outline larger than the subject: (n, 1, SIDE, SIDE) of 0 and 1."""
    axis = torch.arange(SIDE, device=coverage.device) + 0.5
    away = (axis - centre[:, :, None]).abs()  # (n, 2, SIDE)
    reach = size[:, None] + 1 + 5 * margin
    inside = away <= reach[:, :, None]
    box = inside[:, 0, None, :] & inside[:, 1, :, None]
    disc = away[:, 0, None, :].square() + away[:, 1, :, None].square() <= (reach[:, :1, None] + 1).square()
    near, far = (F.max_pool2d(coverage, 2 * n + 1, 1, n)[:, 0] > 0.02 for n in (2, 5))
    outline = torch.where((wide < 0.5)[:, None, None], near, far)
    form = form[:, None, None]
    return torch.where(form < 0.4, box, torch.where(form < 0.7, disc, outline))[:, None].float()

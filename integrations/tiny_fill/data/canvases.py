"""What the tiny model learns from: diptychs with a hole, prompts, and the whole picture that is to be found.

A subject may appear in both panels. As for FLUX Fill, the task is inpainting: the hole is filled by what the
rest of the canvas and the prompt call for. KINDS says how often each is the case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .photos import Photos
from .subjects import PHOTO, Subjects, draw, subjects

SIDE = 64  # pixels of a panel
KINDS = {
    "reference": 0.68,  # the subject above; the prompt names it, or is empty
    "contradiction": 0.1,  # the prompt names another colour, and is right
    "blank": 0.08,  # nothing above; the prompt names the subject
    "stranger": 0.04,  # another subject above; the prompt names the one in the hole
    "nothing": 0.05,  # the hole shows nothing but background, and the prompt says so
    "above": 0.05,  # the hole is in the upper panel
}
SHIFT = 4.0  # pixels, each way, that a subject may stand elsewhere in the lower panel
TURN = 0.15  # radians that it may be turned, and logarithm of how much larger or smaller it may be
EMPTY = 0.3  # share of empty prompts where the reference is enough


@dataclass(frozen=True)
class Canvases:
    """A batch of n diptychs, SIDE wide and 2 SIDE high.

    Attributes:
        pictures: (n, 3, 2 SIDE, SIDE) in [0, 1], whole.
        masks: (n, 1, 2 SIDE, SIDE), 1 in the hole.
        prompts: n of them.
        kinds: (n,) indices into KINDS.
        coverage: (n, 1, 2 SIDE, SIDE): of the subject where it is to be found, whether or not there is a
            hole.
        subjects: those to be found.
        scenes: (n, 3, SIDE, SIDE): the lower panels before anything was put into them.
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
        freedom: of the pose, 0 to 1, or (count,) of them: at 0 a subject stands in the same place of both
            panels; at 1 it is shifted by up to SHIFT, and turned and resized by up to TURN.
        kind: all of one kind of KINDS; None: as often as that says.
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
    """(n, 2): the middle of the panel, or anywhere that the subject fits, with room to be shifted."""
    room = (SIDE / 2 - size - SHIFT).clamp(min=0)[:, None]
    return SIDE / 2 + torch.where(moved[:, None] < 0.5, (2 * where - 1) * room, 0.0)


def _holes(
    coverage: Tensor, centre: Tensor, size: Tensor, form: Tensor, margin: Tensor, wide: Tensor
) -> Tensor:
    """(n, 1, SIDE, SIDE) of 0 and 1: a box, a disc, or the outline itself, each larger than the subject."""
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

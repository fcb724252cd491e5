"""Drawn subjects: an outline, a pattern of one or two colours or a piece of a photo, and spots, in any pose.

A subject's own plane is [-1, 1] x [-1, 1]; its outline is a radius for every angle. A batch is drawn at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .photos import Photos
from .words import COLOURS, NOUNS, PATTERNS, SHAPES, prompt

ANGLES = 256  # entries of an outline's table
SPOTS = 4  # at most
TEXTURE = 48  # pixels of a photo's piece, each way
PHOTO = PATTERNS.index("photo")


@dataclass(frozen=True)
class Subjects:
    """A batch of n subjects.

    Attributes:
        shape: index into SHAPES, (n,) int64.
        pattern: index into PATTERNS, (n,) int64.
        colour: index into COLOURS, (n,) int64.
        second: index into COLOURS, of the pattern's second colour, (n,) int64.
        noun: index into NOUNS, for the prompt of a photo's piece, (n,) int64.
        outline: radii, (n, ANGLES).
        hollow: radius of a hole in the middle, (n,).
        ink: RGB in [0, 1] of the colour, (n, 3).
        second_ink: RGB in [0, 1] of the second colour, (n, 3).
        wave: the pattern's periods from edge to middle, (n,).
        turn: the pattern's angle in radians, (n,).
        phase: the pattern's phases in radians, (n, 2).
        texture: the photo's piece, (n, 3, TEXTURE, TEXTURE) in [0, 1].
        spot_at: centres of the spots, (n, SPOTS, 2).
        spot_size: radii of the spots, 0 for none, (n, SPOTS).
        spot_ink: RGB of the spots, (n, SPOTS, 3).
        light: change of brightness along x and y, (n, 2).
        rim: darkness of the edge, (n,).
    """

    shape: Tensor
    pattern: Tensor
    colour: Tensor
    second: Tensor
    noun: Tensor
    outline: Tensor
    hollow: Tensor
    ink: Tensor
    second_ink: Tensor
    wave: Tensor
    turn: Tensor
    phase: Tensor
    texture: Tensor
    spot_at: Tensor
    spot_size: Tensor
    spot_ink: Tensor
    light: Tensor
    rim: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def prompts(self) -> list[str]:
        """A prompt for each subject."""
        indices = zip(
            *(t.tolist() for t in (self.shape, self.pattern, self.colour, self.second, self.noun)),
            strict=True,
        )
        return [prompt(*index) for index in indices]

    def where(self, chosen: Tensor, other: Subjects) -> Subjects:
        """The same batch, with the subjects of `other` where `chosen` (n,) bool is True."""
        picked = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            picked[field.name] = torch.where(chosen.reshape(-1, *[1] * (mine.ndim - 1)), theirs, mine)
        return Subjects(**picked)

    def recoloured(self, generator: Generator) -> Subjects:
        """The same subjects in other colours; a photo's piece has no colour to change."""
        step = torch.randint(1, len(COLOURS), (len(self),), generator=generator).to(self.colour.device)
        colour = (self.colour + step) % len(COLOURS)
        colour = torch.where(colour == self.second, (colour + 1) % len(COLOURS), colour)
        return replace(self, colour=colour, ink=_inks(colour, generator))


def subjects(count: int, photos: Photos, generator: Generator) -> Subjects:
    """Random subjects on the photos' device; a third show a piece of a photo, half have spots."""
    device = photos.levels[0][0].device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(device)

    def choose(n: int) -> Tensor:
        return torch.randint(n, (count,), generator=generator).to(device)

    shape, colour, noun = choose(len(SHAPES)), choose(len(COLOURS)), choose(len(NOUNS))
    pattern = choose(len(PATTERNS) + 1).clamp(max=PHOTO)
    second = (colour + 1 + choose(len(COLOURS) - 1)) % len(COLOURS)
    spots = (torch.arange(SPOTS, device=device) < (choose(2) * (1 + choose(SPOTS)))[:, None]).float()
    angle, distance = uniform(SPOTS, high=2 * math.pi), uniform(SPOTS, high=0.6)
    return Subjects(
        shape,
        pattern,
        colour,
        second,
        noun,
        outline=_outlines(shape, uniform(4), uniform(4, high=2 * math.pi)),
        hollow=torch.where(shape == SHAPES.index("ring"), uniform(low=0.35, high=0.55), 0.0),
        ink=_inks(colour, generator),
        second_ink=_inks(second, generator),
        wave=uniform(low=1.0, high=2.2),
        turn=uniform(high=math.pi),
        phase=uniform(2, high=2 * math.pi),
        texture=photos.crops(count, TEXTURE, generator),
        spot_at=torch.stack([distance * angle.cos(), distance * angle.sin()], -1),
        spot_size=spots * uniform(SPOTS, low=0.12, high=0.3),
        spot_ink=uniform(SPOTS, 3),
        light=uniform(2, low=-0.2, high=0.2),
        rim=uniform(high=1.0) * choose(2),
    )


def draw(subjects: Subjects, centre: Tensor, size: Tensor, turn: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Draw subjects.

    Args:
        subjects: n of them.
        centre: x and y in pixels, (n, 2).
        size: pixels from the middle to the farthest edge, (n,).
        turn: angle in radians, (n,).
        side: of the square pictures, pixels.

    Returns:
        Colours (n, 3, side, side) and coverage (n, 1, side, side), both in [0, 1].
    """
    device = centre.device
    axis = torch.arange(side, device=device) + 0.5
    x = (axis[None, None, :] - centre[:, 0, None, None]) / size[:, None, None]  # (n, 1, side)
    y = (axis[None, :, None] - centre[:, 1, None, None]) / size[:, None, None]  # (n, side, 1)
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    u, v = x * cos + y * sin, y * cos - x * sin  # (n, side, side)
    pixel = size[:, None, None]  # per unit of the plane
    radius = (u.square() + v.square()).sqrt()
    edge = (
        _around(subjects.outline, torch.atan2(v, u)) - radius
    ) * pixel  # pixels to the outline, along the radius
    hollow = subjects.hollow[:, None, None]
    coverage = (edge + 0.5).clamp(0, 1) * torch.where(
        hollow > 0, ((radius - hollow) * pixel + 0.5).clamp(0, 1), 1.0
    )

    second = _pattern(subjects, u, v, pixel)[:, None]
    colours = torch.lerp(subjects.ink[:, :, None, None], subjects.second_ink[:, :, None, None], second)
    pieces = F.grid_sample(
        subjects.texture, torch.stack([u, v], -1), padding_mode="reflection", align_corners=False
    )
    colours = torch.where((subjects.pattern == PHOTO)[:, None, None, None], pieces, colours)
    for i in range(SPOTS):
        at, reach = subjects.spot_at[:, i, :, None, None], subjects.spot_size[:, i, None, None]
        away = ((u - at[:, 0]).square() + (v - at[:, 1]).square()).sqrt()
        over = torch.where(reach > 0, ((reach - away) * pixel + 0.5).clamp(0, 1), 0.0)[:, None]
        colours = torch.lerp(colours, subjects.spot_ink[:, i, :, None, None].expand_as(colours), over)
    light = 1 + subjects.light[:, 0, None, None] * u + subjects.light[:, 1, None, None] * v
    rim = 1 - 0.7 * subjects.rim[:, None, None] * (1 - (edge.abs() / 2.5)).clamp(0, 1)
    return (colours * (light * rim)[:, None]).clamp(0, 1), coverage[:, None]


def _pattern(subjects: Subjects, u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    """Share of the second colour, (n, side, side)."""
    cos, sin = subjects.turn.cos()[:, None, None], subjects.turn.sin()[:, None, None]
    pace = math.pi * subjects.wave[:, None, None]
    a = pace * (u * cos + v * sin) + subjects.phase[:, 0, None, None]
    b = pace * (v * cos - u * sin) + subjects.phase[:, 1, None, None]
    sharp = pixel / pace  # so that an edge is about a pixel wide
    waves = {"striped": a.sin(), "checked": a.sin() * b.sin(), "dotted": (a.sin() + b.sin()) / 2 - 0.35}
    zero = torch.zeros_like(u)
    which = subjects.pattern[:, None, None]
    return sum(
        (
            torch.where(which == PATTERNS.index(name), (wave * sharp + 0.5).clamp(0, 1), zero)
            for name, wave in waves.items()
        ),
        zero,
    )


def _around(table: Tensor, angle: Tensor) -> Tensor:
    """A table (n, ANGLES) at angles (n, side, side), by linear interpolation."""
    place = (angle / (2 * math.pi)) % 1 * ANGLES
    low = place.floor().long() % ANGLES
    flat = low.flatten(1)
    first, next_ = table.gather(1, flat), table.gather(1, (flat + 1) % ANGLES)
    return torch.lerp(first, next_, (place - place.floor()).flatten(1)).view_as(angle)


def _inks(colour: Tensor, generator: Generator) -> Tensor:
    named = torch.tensor(list(COLOURS.values()), device=colour.device)[colour]
    return (named + 0.05 * torch.randn(named.shape, generator=generator).to(named)).clamp(0, 1)


def _outlines(shape: Tensor, amount: Tensor, phase: Tensor) -> Tensor:
    """Outlines of largest radius 1, (n, ANGLES); amount (n, 4) in [0, 1] and phase (n, 4) vary the blob."""
    t = torch.arange(ANGLES, device=shape.device) * (2 * math.pi / ANGLES)  # 0 to the right, then down

    def polygon(corners: int, first: float) -> Tensor:
        part = 2 * math.pi / corners
        return math.cos(part / 2) / ((t - first) % part - part / 2).cos()

    up, x, y = -math.pi / 2, t.cos(), t.sin()
    part = math.pi / 5  # from a star's point to the next notch
    past = part - ((t - up) % (2 * part) - part).abs()
    circle = torch.ones_like(t)
    bite = 0.6**2 - (0.75 * y).square()  # half the ray's chord of a circle, squared: r 0.6 at (0.75, 0)
    tables = {
        "circle": circle,
        "square": polygon(4, math.pi / 4),
        "triangle": polygon(3, up),
        "star": 0.42 * math.sin(part) / (past.sin() + 0.42 * (part - past).sin()),
        "heart": _heart(x, -y),
        "diamond": 1 / (x.abs() / 0.65 + y.abs()),
        "hexagon": polygon(6, up),
        "flower": 0.72 + 0.28 * (6 * t).cos(),
        "ring": circle,
        "cross": torch.minimum(
            1 / torch.maximum(x.abs(), y.abs()), 0.33 / torch.minimum(x.abs(), y.abs()).clamp(min=1e-3)
        ),
        "moon": torch.where((bite > 0) & (x > 0), 0.75 * x - bite.clamp(min=0).sqrt(), circle),
        "drop": 0.62 + 0.38 * (-y).clamp(min=0) ** 6,
    }
    assert (*tables, "blob") == SHAPES
    waves = torch.arange(2, 6, device=shape.device)
    blob = 1 + ((amount / waves)[:, :, None] * (waves[:, None] * t + phase[:, :, None]).cos()).sum(1)
    made = torch.stack(list(tables.values()))[shape.clamp(max=len(tables) - 1)]
    made = torch.where((shape == SHAPES.index("blob"))[:, None], blob, made).clamp(min=0.05)
    return made / made.amax(1, keepdim=True)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Radii of (a^2 + b^2 - 1)^3 = a^2 b^3 in the directions (x, y), y up."""
    radius = torch.linspace(0.3, 1.6, 1301, device=x.device)[:, None]
    inside = (radius.square() - 1) ** 3 <= radius**5 * x.square() * y**3
    return (radius * inside).amax(0)

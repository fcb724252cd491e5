"""The insertions of `flashbrush demo`: photographed and drawn subjects, into photos of scikit-image."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from ..evaluation.insertion.items import Item, to_picture
from ..tiny_fill.data.photos import HELD_OUT, photos
from ..tiny_fill.data.subjects import draw, subjects

Box = tuple[int, int, int, int]

# Outlines drawn by hand on scikit-image's photos, (x, y) in pixels.
CAT = (
    (34, 30),
    (62, 0),
    (232, 0),
    (330, 27),
    (384, 0),
    (399, 0),
    (370, 76),
    (362, 136),
    (363, 192),
    (334, 246),
    (336, 299),
    (18, 299),
    (10, 240),
    (40, 170),
    (30, 100),
)
SAUCER = (78, 18, 478, 384)
SIDE = 160  # pixels of a drawn subject's picture
SEED, MADE = 7, 48  # seed and number of the random subjects
CHOSEN = {"moon": 10, "star": 36, "hexagon": 41}  # index of those that are inserted


def items() -> list[Item]:
    """The insertions in the order in which they are shown. The model was not trained on their photos.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
    """
    textures = photos(HELD_OUT)  # raises where a package is missing
    from skimage import data

    cat, coffee, rocket = (Image.fromarray(getattr(data, name)()) for name in HELD_OUT)
    face, saucer = Image.new("L", cat.size, 0), Image.new("L", coffee.size, 0)
    ImageDraw.Draw(face).polygon(CAT, fill=255)
    ImageDraw.Draw(saucer).ellipse(SAUCER, fill=255)

    made = subjects(MADE, textures, torch.Generator().manual_seed(SEED))
    middle, size = torch.full((MADE, 2), SIDE / 2), torch.full((MADE,), 0.45 * SIDE)
    colours, coverage = draw(made, middle, size, torch.zeros(MADE), SIDE)

    def drawn(name: str, scene: Image.Image, hole: Box) -> Item:
        one = CHOSEN[name]
        outline = to_picture((coverage[one] > 0.5).float())
        return Item(name, made.prompts()[one], to_picture(colours[one]), scene, _hole(scene, hole), outline)

    return [
        Item("cat", "a photo of a cat", cat, coffee, _hole(coffee, (40, 40, 200, 200)), face),
        Item("cup", "a photo of a cup", coffee, rocket, _hole(rocket, (200, 60, 320, 180)), saucer),
        drawn("moon", rocket, (340, 40, 470, 170)),
        drawn("star", coffee, (420, 220, 560, 360)),
        drawn("hexagon", cat, (60, 150, 180, 270)),
    ]


def _hole(scene: Image.Image, box: Box) -> Image.Image:
    mask = Image.new("L", scene.size, 0)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask

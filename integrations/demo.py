"""The demonstration: scikit-image's cat into its coffee scene, with a checkpoint that is built on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

PROMPT = "a cat sitting on the table beside a cup of coffee"
PANEL = (304, 208)  # pixels, near the coffee scene's 3:2


class Photos(NamedTuple):
    subject: Image.Image
    subject_mask: Image.Image
    scene: Image.Image
    mask: Image.Image

    def save(self, folder: Path) -> dict[str, Path]:
        """Write them as PNG files; their paths by field."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: folder / f"{name}.png" for name in self._fields}
        for name, path in paths.items():
            getattr(self, name).save(path)
        return paths


def photos() -> Photos:
    """Real photos that scikit-image brings: Chelsea the cat, and a cup of coffee; masks drawn by hand.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("the demonstration takes its photos from scikit-image: pip install scikit-image") from error
    cat, coffee = Image.fromarray(data.chelsea()), Image.fromarray(data.coffee())
    face = Image.new("L", cat.size, 0)
    outline = (
        (34, 30), (62, 0), (232, 0), (330, 27), (384, 0), (399, 0), (370, 76), (362, 136), (363, 192), (334, 246),
        (336, 299), (18, 299), (10, 240), (40, 170), (30, 100),
    )  # fmt: skip
    ImageDraw.Draw(face).polygon(outline, fill=255)
    hole = Image.new("L", coffee.size, 0)
    ImageDraw.Draw(hole).ellipse((24, 40, 184, 216), fill=255)
    return Photos(cat, face, coffee, hole)

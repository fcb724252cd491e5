"""Photos that come with scikit-image and scikit-learn: for training, and held out for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

TRAINING = (
    "astronaut",
    "china",
    "flower",
    "brick",
    "grass",
    "gravel",
    "hubble_deep_field",
    "retina",
    "stereo_motorcycle",
    "immunohistochemistry",
    "coins",
    "camera",
    "colorwheel",
)
HELD_OUT = ("chelsea", "coffee", "rocket")
HEIGHTS = (72, 104, 160)  # pixels of the shorter side, which decide how much of a photo a crop shows


@dataclass(frozen=True)
class Photos:
    """Photos at several sizes.

    Attributes:
        levels: of each photo, (3, height, width) float32 in [0, 1] at every height of HEIGHTS.
    """

    levels: list[list[Tensor]]

    def crops(self, count: int, side: int, generator: Generator) -> Tensor:
        """Random crops of random photos, (count, 3, side, side), some mirrored, with varied brightness."""
        device = self.levels[0][0].device
        which, level, flip = (
            torch.randint(n, (count,), generator=generator) for n in (len(self.levels), len(HEIGHTS), 2)
        )
        corner = torch.rand(count, 2, generator=generator)
        light = (0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)).to(device)
        pieces = []
        for i in range(count):
            photo = self.levels[which[i]][level[i]]
            top, left = (int(corner[i, a] * (photo.shape[1 + a] - side + 1)) for a in (0, 1))
            piece = photo[:, top : top + side, left : left + side]
            pieces.append(piece.flip(-1) if flip[i] else piece)
        return (torch.stack(pieces) * light).clamp(0, 1)


@lru_cache(maxsize=4)
def photos(names: tuple[str, ...] = TRAINING, device: str = "cpu") -> Photos:
    """The named photos; they are read once and kept.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
    """
    return Photos([_levels(_read(name).to(device)) for name in names])


def _read(name: str) -> Tensor:
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError(
            "the tiny model's photos are scikit-image's and scikit-learn's: install both"
        ) from error
    if name in ("china", "flower"):
        picture = load_sample_image(f"{name}.jpg")
    else:
        picture = getattr(data, name)()
        picture = picture[0] if isinstance(picture, tuple) else picture
    pixels = torch.tensor(picture).float() / 255
    return (pixels[..., None].expand(*pixels.shape, 3) if pixels.ndim == 2 else pixels[..., :3]).permute(
        2, 0, 1
    )


def _levels(photo: Tensor) -> list[Tensor]:
    short = min(photo.shape[1:])
    sizes = [[round(n * height / short) for n in photo.shape[1:]] for height in HEIGHTS]
    resized = [F.interpolate(photo[None], size, mode="bilinear", antialias=True)[0] for size in sizes]
    return [level.clamp(0, 1) for level in resized]

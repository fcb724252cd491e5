"""Photos, masks and folders for the tests of vicl and eval vicl."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("skimage")
from skimage import data

SIZE = (64, 48)
QUICK = ["--steps", "3", "--skip", "1", "--dtype", "float32"]


def photo(name: str, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(getattr(data, name)()).convert("RGB").resize(size)


def mask(name: str) -> Image.Image:
    """White where the photo is light."""
    return photo(name).convert("L").point([0] * 128 + [255] * 128).convert("RGB")


def folder_of_another_model(folder: Path) -> Path:
    """A checkpoint's folder with a transformer in place of the UNet."""
    (folder / "flux" / "transformer").mkdir(parents=True)
    return folder / "flux"

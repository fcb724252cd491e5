"""The tiny models: that which comes with the package, and Stable Diffusion built once; photos to insert from and into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flashbrush as fb


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    pytest.importorskip("diffusers")
    return fb.tiny_fill()


@pytest.fixture(scope="session")
def sd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    from .tiny_sd import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("stable_diffusion"))


@pytest.fixture(scope="session")
def pipe(checkpoint: Path):
    from flashbrush.integrations import InContextBrushPipeline

    pipe = InContextBrushPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Path]:
    """Files: a subject of 40 x 30 pixels with its mask, a photo of 64 x 48 with a hole."""
    rng = np.random.default_rng(0)
    pictures = {
        "subject": rng.integers(0, 256, (30, 40, 3), dtype=np.uint8),
        "subject_mask": np.zeros((30, 40), np.uint8),
        "image": rng.integers(0, 256, (48, 64, 3), dtype=np.uint8),
        "mask": np.zeros((48, 64), np.uint8),
    }
    pictures["subject_mask"][5:25, 8:30] = 255
    pictures["mask"][10:33, 20:45] = 255
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in pictures}

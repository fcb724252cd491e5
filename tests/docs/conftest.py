"""Stand-ins for what the pages' code names: checkpoints of the hub, photos, a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flashbrush as fb

from ..integrations.conftest import checkpoint, flux_checkpoint, sd_checkpoint  # noqa: F401

SIDE = 64
PHOTOS = ("cat", "dog", "table", "park", "zebra", "photo")
MASKS = ("cat-mask", "dog-mask", "hole")


@pytest.fixture
def stand_ins(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """The folder in which a page's code runs, and the variables that it does not define.

    Names of the hub lead to tiny models in float32, and every device is the CPU.
    """
    diffusers = pytest.importorskip("diffusers")
    standing = {
        "black-forest-labs/FLUX.1-Fill-dev": fb.tiny_fill,
        "black-forest-labs/FLUX.1-dev": lambda: request.getfixturevalue("flux_checkpoint"),
        "stable-diffusion-v1-5/stable-diffusion-v1-5": lambda: request.getfixturevalue("sd_checkpoint"),
    }
    load = diffusers.DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(cls, model, **options):
        options["dtype"] = torch.float32
        pipe = load(cls, standing[model]() if model in standing else model, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda self, *_, **__: self)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path)
    diptych, mask = Image.new("RGB", (SIDE, 2 * SIDE), "white"), Image.new("L", (SIDE, 2 * SIDE), 0)
    mask.paste(255, (12, SIDE + 12, 52, SIDE + 52))
    return {"prompt": "a red disc", "diptych": diptych, "mask": mask}


def write_photos(folder: Path) -> None:
    """Noise for each photo, a square for each mask, and the photos of the demo's cup."""
    generator = np.random.default_rng(0)
    demo = folder / "demo" / "photos"
    demo.mkdir(parents=True)
    photos = [*(folder / f"{name}.png" for name in PHOTOS), demo / "cup_subject.png", demo / "cup_image.png"]
    masks = [*(folder / f"{name}.png" for name in MASKS), demo / "cup_subject_mask.png", demo / "cup_mask.png"]
    for path in photos:
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    for path in masks:
        mask = Image.new("L", (SIDE, SIDE), 0)
        mask.paste(255, (16, 16, 48, 48))
        mask.save(path)

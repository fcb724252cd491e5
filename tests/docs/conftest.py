"""Stand-ins for what the pages' code names: checkpoints of the hub, photos, a GPU."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flashbrush as fb

from .markdown import ROOT

SIDE = 64
PHOTOS = ("cat", "dog", "table", "park", "zebra")
MASKS = ("cat-mask", "dog-mask", "hole")


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The variables that a page's code does not define; the code runs in a folder with its photos.

    Names of the hub lead to tiny models in float32, and every device is the CPU.
    """
    diffusers = pytest.importorskip("diffusers")
    load = diffusers.DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(cls: type, model: Any, **options: Any) -> Any:
        if model == "stable-diffusion-v1-5/stable-diffusion-v1-5":
            pipe = stable_diffusion()
        elif model == "black-forest-labs/FLUX.1-dev":
            pipe = flux()
        else:
            is_fill = model == "black-forest-labs/FLUX.1-Fill-dev"
            pipe = load(cls, fb.tiny_fill() if is_fill else model, dtype=torch.float32)
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


def stable_diffusion() -> Any:
    """The one of examples/visual_in_context.py, with random weights."""
    return runpy.run_path(str(ROOT / "examples" / "visual_in_context.py"))["random_stable_diffusion"]()


def flux() -> Any:
    """A FluxPipeline of the tiny model's autoencoder and text encoders, and a random transformer."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxFillPipeline,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    parts = dict(FluxFillPipeline.from_pretrained(fb.tiny_fill()).components)
    channels = 4 * parts["vae"].config.latent_channels
    parts["transformer"] = FluxTransformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts["text_encoder_2"].config.d_model,
        pooled_projection_dim=parts["text_encoder"].config.hidden_size,
        axes_dims_rope=(4, 6, 6),
    )
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256
    )
    return FluxPipeline(**parts, image_encoder=None, feature_extractor=None)


def write_photos(folder: Path) -> None:
    """Noise for each photo, a square for each mask, and the photos of the demo's cup."""
    generator = np.random.default_rng(0)
    demo = folder / "demo" / "photos"
    demo.mkdir(parents=True)
    photos = [*(folder / f"{name}.png" for name in PHOTOS), demo / "cup_subject.png", demo / "cup_image.png"]
    masks = [
        *(folder / f"{name}.png" for name in MASKS),
        demo / "cup_subject_mask.png",
        demo / "cup_mask.png",
    ]
    for path in photos:
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    for path in masks:
        mask = Image.new("L", (SIDE, SIDE), 0)
        mask.paste(255, (16, 16, 48, 48))
        mask.save(path)

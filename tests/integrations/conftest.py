"""Tiny models, each built once, and photos and masks for them."""

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
def flux_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline's folder: the autoencoder and text encoders of the tiny model, a random transformer."""
    pytest.importorskip("diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxPipeline

    from .tiny import tiny_flux

    parts = dict(FluxFillPipeline.from_pretrained(checkpoint, dtype=torch.float32).components)
    channels = 4 * parts["vae"].config.latent_channels
    width, pooled = parts["text_encoder_2"].config.d_model, parts["text_encoder"].config.hidden_size
    transformer = tiny_flux(
        double=1, single=1, in_channels=channels, out_channels=channels, joint=width, pooled=pooled
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256
    )
    unused = {"image_encoder": None, "feature_extractor": None}
    pipe = FluxPipeline(**(parts | unused | {"transformer": transformer, "scheduler": scheduler}))
    where = tmp_path_factory.mktemp("flux") / "model"
    pipe.save_pretrained(where, safe_serialization=True)
    return where


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


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    """One rectangle that no token's edge meets, of 64 x 48 pixels."""
    picture = Image.new("L", (64, 48), 0)
    picture.paste(255, (17, 9, 39, 30))
    return picture

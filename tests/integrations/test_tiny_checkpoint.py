"""The tiny checkpoint: diffusers' own folder format, real classes, an autoencoder that shows what it is given."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline
from PIL import Image, ImageFilter

from flashbrush.integrations import tiny_checkpoint


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_folder_is_diffusers_own(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["_class_name"] == "FluxFillPipeline"
    parts = {name: value[1] for name, value in index.items() if not name.startswith("_")}
    assert parts == {
        "scheduler": "FlowMatchEulerDiscreteScheduler", "vae": "AutoencoderKL", "transformer": "FluxTransformer2DModel",
        "text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel",
        "tokenizer": parts["tokenizer"], "tokenizer_2": parts["tokenizer_2"],
    }  # fmt: skip
    assert not [path for path in checkpoint.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert sum(path.stat().st_size for path in checkpoint.rglob("*")) < 8e6


def test_the_stock_pipeline_loads_and_runs_it(checkpoint: Path) -> None:
    pipe = FluxFillPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    images = [
        pipe(
            prompt=prompt, image=Image.new("RGB", (32, 32), (90, 60, 30)), mask_image=mask, width=32, height=32,
            num_inference_steps=2, max_sequence_length=32, output_type="np", generator=torch.Generator().manual_seed(0),
        ).images
        for prompt in ("a cat", "a cat", "a red cup")
    ]  # fmt: skip
    assert images[0].shape == (1, 32, 32, 3) and np.isfinite(images[0]).all()
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_the_seed_decides(tmp_path: Path, checkpoint: Path) -> None:
    state = torch.get_rng_state()
    again, other = (digests(tiny_checkpoint.build(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert again == digests(checkpoint)
    changed = {name for name in again if again[name] != other[name]}
    assert {Path(name).parts[0] for name in changed} >= {"transformer", "text_encoder", "text_encoder_2"}


def test_the_autoencoder_shows_a_photo(pipe) -> None:
    vae = pipe.pipe.vae
    noise = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)
    grey = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(6))
    photo = Image.merge("RGB", [grey, grey.transpose(Image.Transpose.ROTATE_180), grey.point(lambda level: 255 - level)])
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        distribution = vae.encode(pixels).latent_dist
        latents = distribution.mode() * vae.config.scaling_factor
        back = vae.decode(distribution.mode()).sample
    cells = torch.nn.functional.avg_pool2d(pixels, tiny_checkpoint.CELL)
    torch.testing.assert_close(latents[:, :3], cells * 2, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(latents[:, 3], cells.mean(1) * 2, atol=2e-3, rtol=1e-3)
    assert float(distribution.std.max()) < 0.01
    assert float((back - pixels).abs().mean()) < 0.1 * float(pixels.std()) + 0.01
    flat = torch.full((1, 3, 16, 16), 0.25)
    with torch.no_grad():
        inner = vae.decode(vae.encode(flat).latent_dist.mode()).sample[:, :, 4:-4, 4:-4]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.25), atol=2e-3, rtol=0)


def test_only_checkpoints_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"folder: .*mine exists and is not a diffusers checkpoint"):
        tiny_checkpoint.build(tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"
    folder = tiny_checkpoint.build(tmp_path / "model")
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "stray.txt").touch()
    tiny_checkpoint.build(folder)
    assert not (folder / "stray.txt").exists() and json.loads((folder / "vae" / "config.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "model"}


def test_a_failure_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint.build(tmp_path / "model")
    before = digests(folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(FluxFillPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_checkpoint.build(folder, seed=1)
    assert digests(folder) == before and [path.name for path in tmp_path.iterdir()] == ["model"]

"""The tiny model that comes with the package: in diffusers' format, and it copies the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flashbrush as fb

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from diffusers import FluxFillPipeline

from flashbrush.integrations import InContextBrush, InContextBrushPipeline
from flashbrush.integrations.evaluation.insertion.items import Item, held_out
from flashbrush.integrations.evaluation.insertion.judges import measure

NEUTRAL = InContextBrush(alpha_prompt=0, alpha_subject=0, gain_span=0)
COUNT = 8  # items of each kind; the means below differ by several of their standard errors


@pytest.fixture(scope="module")
def pipe() -> InContextBrushPipeline:
    return InContextBrushPipeline.from_pretrained(fb.tiny_fill(), dtype=torch.float32)


def fill(pipe: InContextBrushPipeline, items: list[Item], **options: object) -> list[Image.Image]:
    options = {"steps": 6, "seed": list(range(len(items))), "method": NEUTRAL, "progress": False} | options
    return pipe(
        [item.prompt for item in items],
        subject=[item.subject for item in items],
        image=[item.image for item in items],
        mask=[item.mask for item in items],
        width=64,
        height=64,
        **options,
    ).images


def test_the_folder_has_diffusers_format() -> None:
    folder = fb.tiny_fill()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "FluxFillPipeline"
    parts = {name: value[1] for name, value in index.items() if not name.startswith("_")}
    assert parts == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "vae": "AutoencoderKL",
        "transformer": "FluxTransformer2DModel",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": parts["tokenizer"],
        "tokenizer_2": parts["tokenizer_2"],
    }
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 25e6
    assert "Licence" in (folder / "README.md").read_text()


def test_raises_when_the_model_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flashbrush.checkpoints as home

    monkeypatch.setattr(home, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"tiny_fill: .*installed without its data"):
        fb.tiny_fill()


def test_the_stock_pipeline_loads_and_runs_it() -> None:
    pipe = FluxFillPipeline.from_pretrained(fb.tiny_fill(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    mask = Image.new("L", (64, 128))
    mask.paste(255, (16, 80, 48, 112))
    images = [
        pipe(
            prompt=prompt,
            image=Image.new("RGB", (64, 128), (90, 60, 30)),
            mask_image=mask,
            width=64,
            height=128,
            num_inference_steps=2,
            max_sequence_length=16,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        for prompt in ("a plain red star", "a plain red star", "a plain blue ring")
    ]
    assert images[0].shape == (1, 128, 64, 3) and np.isfinite(images[0]).all()
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_it_copies_the_reference(pipe: InContextBrushPipeline) -> None:
    """The bounds lie between the model's results and those of a model that ignores the reference."""
    measured = {}
    for reference in ("own", "blank", "stranger"):
        items = held_out(COUNT, reference=reference, freedom=0.0)
        rows = [measure(item, picture) for item, picture in zip(items, fill(pipe, items), strict=True)]
        measured[reference] = {
            name: float(np.mean([row[name] for row in rows])) for name in ("psnr_hole", "pattern")
        }
    assert measured["own"]["pattern"] > 0.4 > 0.25 > measured["blank"]["pattern"]
    assert measured["own"]["pattern"] > measured["stranger"]["pattern"] + 0.25
    assert measured["own"]["psnr_hole"] > measured["blank"]["psnr_hole"] + 2


def test_a_seed_gives_the_same_picture(pipe: InContextBrushPipeline) -> None:
    items = held_out(2)
    first, again, other = (fill(pipe, items, seed=seed) for seed in ([3, 4], [3, 4], [5, 4]))
    assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
    assert first[0].tobytes() != other[0].tobytes() and first[1].tobytes() == other[1].tobytes()


def test_the_autoencoder_reconstructs_a_photo(pipe: InContextBrushPipeline) -> None:
    vae, photo = pipe.pipe.vae, held_out(1)[0].truth
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        distribution = vae.encode(pixels).latent_dist
        back = vae.decode(distribution.mode()).sample
    assert float(distribution.std.max()) < 0.01
    assert float((back - pixels).square().mean()) < 0.02  # 23 dB

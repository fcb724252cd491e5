"""Training the tiny FLUX.1-Fill: reproducible, resumable, and the result is a FluxFillPipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from diffusers import FluxFillPipeline

from flashbrush.integrations.tiny_fill.data.canvases import canvases
from flashbrush.integrations.tiny_fill.data.photos import HELD_OUT, photos
from flashbrush.integrations.tiny_fill.training import autoencoder, model, train
from flashbrush.integrations.tiny_fill.training.sampling import judge
from flashbrush.integrations.tiny_fill.training.state import Recipe, Training

QUICK = Recipe(steps=3, decoder_steps=2, batch=1, warmup=1)


@pytest.fixture(scope="module")
def components() -> tuple[torch.Tensor, torch.Tensor]:
    return autoencoder.principal_components(photos(), Generator().manual_seed(0), 128)


@pytest.fixture
def given_components(components, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run takes the components of 128 canvases, computed once, in place of those of 1,024."""
    monkeypatch.setattr(autoencoder, "principal_components", lambda photos, generator: components)


def weights(training: Training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for part in training.parts.values() for p in part.parameters()])


@torch.no_grad()
def test_the_encoder_equals_one_convolution(components) -> None:
    weight, bias = components
    vae = autoencoder.autoencoder(weight, bias)
    pixels = 2 * canvases(4, photos(HELD_OUT), Generator().manual_seed(1)).pictures - 1
    distribution = vae.encode(pixels).latent_dist
    torch.testing.assert_close(
        distribution.mode(), F.conv2d(pixels, weight, bias, stride=4), atol=2e-3, rtol=1e-3
    )
    assert float(distribution.std.max()) < 0.01
    latents = F.conv2d(
        2 * canvases(128, photos(), Generator().manual_seed(2)).pictures - 1, weight, bias, stride=4
    )
    assert abs(float(latents.square().mean()) - 1) < 0.25 and latents.mean((0, 2, 3)).abs().max() < 0.5
    products = (weight.flatten(1) @ weight.flatten(1).T).fill_diagonal_(0)
    assert products.abs().max() < 1e-4


def test_packing_equals_the_pipeline_s() -> None:
    latents = torch.randn(2, 8, 6, 4)
    assert torch.equal(model.pack(latents), FluxFillPipeline._pack_latents(latents, 2, 8, 6, 4))
    ids = FluxFillPipeline._prepare_latent_image_ids(1, 3, 2, torch.device("cpu"), torch.float32)
    assert torch.equal(model.token_places(3, 2), ids)


def test_a_resumed_run_equals_an_uninterrupted_one(given_components, tmp_path: Path) -> None:
    """Two steps of the transformer and one of the decoder; the second run is saved after the first step."""
    whole, first = Training(QUICK, "cpu"), Training(QUICK, "cpu")
    before = weights(whole)
    assert torch.equal(before, weights(first))
    for part in ("transformer", "transformer", "decoder"):
        assert whole.step(part) > 0
    first.step("transformer")
    first.save(tmp_path / "state.pt")
    resumed = Training(QUICK, "cpu")
    resumed.load(tmp_path / "state.pt")
    assert resumed.done == {"transformer": 1, "decoder": 0}
    for part in ("transformer", "decoder"):
        resumed.step(part)
    assert torch.equal(weights(whole), weights(resumed)) and not torch.equal(weights(whole), before)
    for name, average in whole.averages["transformer"].items():
        assert torch.equal(average, resumed.averages["transformer"][name])


def test_the_command_writes_a_checkpoint_for_the_stock_pipeline(
    given_components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "judge", lambda training: judge(training, 2))
    train.main(tmp_path, steps=1, decoder_steps=1, batch=1, device="cpu", every=2)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[0].startswith("part,step,loss,psnr 0") and [row.split(",")[0] for row in rows[1:]] == [
        "transformer",
        "decoder",
    ]
    assert all(float(value) for value in rows[1].split(",")[2:])
    pipe = FluxFillPipeline.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    some = canvases(1, photos(HELD_OUT), Generator().manual_seed(0))
    images = [
        pipe(
            prompt=text,
            image=some.pictures,
            mask_image=some.masks,
            width=64,
            height=128,
            num_inference_steps=2,
            max_sequence_length=model.TEXT_TOKENS,
            output_type="pt",
            generator=Generator().manual_seed(0),
        ).images
        for text in ("a red star with blue stripes", "a plain green ring")
    ]
    assert images[0].shape == (1, 3, 128, 64) and images[0].isfinite().all()
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint").rglob("*.safetensors"))
    assert size < 25e6

"""Measures of one insertion: their best values, a known error, a named colour, and the model judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from flashbrush.integrations.evaluation.insertion.items import held_out
from flashbrush.integrations.evaluation.insertion.judges import MEASURES, Models, measure


@pytest.fixture(scope="module")
def items():
    return held_out(12)


def test_the_truth_scores_best(items) -> None:
    rng = np.random.default_rng(0)
    for item in items:
        best = measure(item, item.truth)
        assert best["psnr_hole"] == pytest.approx(100) and best["psnr_outside"] == pytest.approx(100)
        assert best["pattern"] == pytest.approx(1, abs=1e-6) and set(best) <= set(MEASURES)
        noisy = Image.fromarray(
            (np.asarray(item.truth) * 0.8 + rng.integers(0, 51, (64, 64, 3))).astype(np.uint8)
        )
        worse = measure(item, noisy)
        assert worse["psnr_hole"] < 40 and worse["psnr_outside"] < 40 and worse["pattern"] < best["pattern"]
        flat = measure(item, Image.new("RGB", item.image.size, (128, 128, 128)))
        assert abs(flat["pattern"]) < 1e-9 and flat["palette"] <= best["palette"]


def test_psnr_and_colour_equal_known_values() -> None:
    item = next(
        item for item in held_out(96, kind="contradiction") if item.colour not in ("", "red", "pink", "brown")
    )
    truth, where = np.asarray(item.truth).astype(int), np.asarray(item.coverage) > 0
    assert measure(item, item.truth)["colour"] == 1
    red = truth.copy()
    red[where] = (210, 30, 30)
    assert measure(item, Image.fromarray(red.astype(np.uint8)))["colour"] == 0
    off = np.where(truth > 128, truth - 51, truth + 51)
    assert measure(item, Image.fromarray(off.astype(np.uint8)))["psnr_hole"] == pytest.approx(
        -20 * np.log10(0.2)
    )
    with pytest.raises(ValueError, match="result: expected"):
        measure(item, Image.new("RGB", (8, 8)))


def test_dino_and_clip_score_equal_pictures_best(items, tmp_path: Path) -> None:
    from transformers import (
        BitImageProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        Dinov2Config,
        Dinov2Model,
    )

    from flashbrush.integrations.tiny_fill.data.words import tokenizer, vocabulary

    torch.manual_seed(0)
    size = {"shortest_edge": 28}
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    BitImageProcessor(size=size, crop_size=28).save_pretrained(tmp_path / "dino")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": 16,
        "eos_token_id": vocabulary()["</s>"],
    }
    vision = {**small, "image_size": 28, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        tmp_path / "clip"
    )
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=28), tokenizer()).save_pretrained(tmp_path / "clip")
    models = Models(tmp_path / "dino", tmp_path / "clip")
    item = next(item for item in items if item.prompt)
    same = replace(item, subject=item.truth.crop(item.mask.getbbox()))
    measured = models.measure(same, item.truth)
    assert measured["dino"] == pytest.approx(1, abs=1e-5) and measured["clip_i"] == pytest.approx(1, abs=1e-5)
    assert -1 <= measured["clip_t"] <= 1
    other = models.measure(item, item.truth)
    assert other["dino"] < 0.99999 and set(other) == {"dino", "clip_i", "clip_t"}
    assert Models().measure(item, item.truth) == {}

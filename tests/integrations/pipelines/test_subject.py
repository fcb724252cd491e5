"""SubjectFinder with tiny random checkpoints of the real model classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashbrush.integrations.pipelines import InContextBrushPipeline, SubjectFinder
from flashbrush.integrations.pipelines.images import subject_panel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", ".", "?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SamConfig,
        SamImageProcessor,
        SamModel,
        SamProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("finder")
    torch.manual_seed(0)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    detector = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=SwinConfig(
                image_size=64,
                embed_dim=16,
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 1, 1],
                window_size=4,
                out_features=["stage2", "stage3", "stage4"],
                out_indices=[2, 3, 4],
            ),
            text_config=BertConfig(vocab_size=len(WORDS), **small),
            d_model=64,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=12,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_feature_levels=4,
        )
    )
    detector.save_pretrained(folder / "detector")
    GroundingDinoProcessor(
        GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}),
        BertTokenizer(str(folder / "vocab.txt")),
    ).save_pretrained(folder / "detector")
    vision = {
        **small,
        "image_size": 64,
        "patch_size": 16,
        "output_channels": 16,
        "window_size": 2,
        "mlp_dim": 32,
        "num_pos_feats": 8,
        "global_attn_indexes": [0],
    }
    prompt = {"hidden_size": 16, "image_embedding_size": 4, "image_size": 64, "mask_input_channels": 4}
    mask = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "mlp_dim": 32,
        "iou_head_hidden_dim": 16,
        "num_hidden_layers": 1,
    }
    SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    ).save_pretrained(folder / "segmenter")
    SamProcessor(
        SamImageProcessor(
            size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16}
        )
    ).save_pretrained(folder / "segmenter")
    return folder / "detector", folder / "segmenter"


@pytest.fixture(scope="module")
def finder(folders: tuple[Path, Path]) -> SubjectFinder:
    return SubjectFinder.from_pretrained(*folders)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def test_box_and_outline_are_within_the_picture(finder: SubjectFinder) -> None:
    box = finder.find(picture(), "A cat", box_threshold=0.0, text_threshold=0.0)
    left, top, right, bottom = box
    assert 0 <= left <= right <= 64 and 0 <= top <= bottom <= 48
    outline = finder.outline(picture(), box)
    assert outline.size == (64, 48) and set(np.unique(outline)) <= {0, 255}


def test_the_named_box_with_the_highest_score_is_taken(
    finder: SubjectFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {
        "boxes": torch.tensor([[1.0, 2, 30, 40], [5, 6, 99, 20], [0, 0, 1, 1]]),
        "scores": torch.tensor([0.4, 0.7, 0.9]),
        "text_labels": ["a cat", "a cat", ""],
    }
    monkeypatch.setattr(
        finder.detector_processor,
        "post_process_grounded_object_detection",
        lambda *a, **k: [answer],
        raising=False,
    )
    assert finder.find(picture(), "a cat") == (5.0, 6.0, 64.0, 20.0)


def test_raises_when_nothing_is_found(finder: SubjectFinder) -> None:
    with pytest.raises(ValueError, match="subject_name: no 'a dog' found"):
        finder(picture(), "a dog", box_threshold=1.0)
    with pytest.raises(ValueError, match="subject_name: expected a few words"):
        finder(picture(), " . ")


def test_pickles_are_not_loaded(folders: tuple[Path, Path], tmp_path: Path) -> None:
    detector, segmenter = folders
    (tmp_path / "segmenter").mkdir()
    for file in segmenter.iterdir():
        name = file.name.replace("model.safetensors", "pytorch_model.bin")
        (tmp_path / "segmenter" / name).write_bytes(file.read_bytes())
    with pytest.raises(OSError, match="safetensors"):
        SubjectFinder.from_pretrained(detector, tmp_path / "segmenter")


def test_pipeline_loads_and_uses_the_finder(
    folders: tuple[Path, Path], finder: SubjectFinder, checkpoint, photos
) -> None:
    pipe = InContextBrushPipeline.from_pretrained(checkpoint, detector=folders[0], segmenter=folders[1])
    inputs = {name: photos[name] for name in ("subject", "image", "mask")}
    result = pipe("a cat", **inputs, subject_name="a cat", steps=1, seed=0, progress=False)
    subject = Image.open(photos["subject"])
    panel = subject_panel(subject, finder(subject, "a cat"), (64, 48))
    assert result.diptychs[0].crop((0, 0, 64, 48)).tobytes() == panel.tobytes()

"""Measures of one insertion: against the truth where it is known, and by DINO and CLIP if given."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...pipelines import images as im
from ...tiny_fill.data.words import COLOURS
from .items import Item

BINS = 6  # per colour channel, of a palette's histogram
MEASURES = {
    "psnr_hole": "dB, against the truth, inside of the mask",
    "psnr_outside": "dB, against the photo, outside of the mask",
    "pattern": "correlation with the truth over the subject's pixels, each channel's mean taken away",
    "colour": "1 where the subject's colour is nearest to the one that the prompt names, else 0",
    "palette": "shared part of the colours' histograms: subject, and what was painted",
    "dino": "cosine of DINO's features: subject, and what was painted",
    "clip_i": "cosine of CLIP's features: subject, and what was painted",
    "clip_t": "cosine of CLIP's features: prompt, and what was painted",
}


def pixels(picture: Image.Image) -> np.ndarray:
    """A picture as (height, width, 3) float64 in [0, 1]; a mask as (height, width) bool."""
    if picture.mode == "L":
        return np.asarray(picture) > 127
    return np.asarray(im.flatten(picture), np.float64) / 255


def measure(item: Item, result: Image.Image) -> dict[str, float]:
    """The MEASURES that need no model and that the item allows, by name.

    Args:
        item: what was inserted.
        result: the picture, of image's size.

    Raises:
        ValueError: a result of another size.
    """
    if result.size != item.image.size:
        raise ValueError(f"result: expected {item.image.size} pixels, got {result.size}")
    found, photo, hole = pixels(result), pixels(item.image), pixels(item.mask)
    measured = {"psnr_outside": _psnr(found[~hole], photo[~hole])}
    outline = item.subject_mask or im.alpha_mask(item.subject)
    subject = pixels(item.subject)
    shown = pixels(outline) if outline is not None else (subject < 0.97).any(2)  # all but the white panel
    if shown.any():
        measured["palette"] = _shared(_histogram(subject[shown]), _histogram(found[hole]))
    if item.truth is not None:
        measured["psnr_hole"] = _psnr(found[hole], pixels(item.truth)[hole])
    if item.truth is not None and item.coverage is not None:
        where = pixels(item.coverage)
        a, b = (p[where] - p[where].mean(0) for p in (found, pixels(item.truth)))
        measured["pattern"] = float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-9))
        if item.colour:
            named, truth = np.array(list(COLOURS.values())), pixels(item.truth)[where]
            asked = named[list(COLOURS).index(item.colour)]
            # Only pixels whose truth has that colour: a second colour and spots do not count.
            own = found[where][np.abs(truth - asked).max(1) < 0.25]
            if len(own):
                nearest = np.argmin(((np.median(own, 0) - named) ** 2).sum(1))
                measured["colour"] = float(list(COLOURS)[nearest] == item.colour)
    return measured


def _psnr(found: np.ndarray, truth: np.ndarray) -> float:
    return float(-10 * np.log10(max(((found - truth) ** 2).mean(), 1e-10))) if found.size else float("nan")


def _histogram(colours: np.ndarray) -> np.ndarray:
    counts, _ = np.histogramdd(colours, bins=(BINS,) * 3, range=((0, 1),) * 3)
    return counts / counts.sum()


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum())


class Models:
    """DINO and CLIP models of transformers, which judge identity and agreement with the prompt.

    Args:
        dino: hub id or folder of a DINO or DINOv2 model; None: not measured.
        clip: hub id or folder of a CLIP model; None: not measured.
        device: where the models run, in float32.
        options: passed on to every from_pretrained.

    Raises:
        OSError: not found.
    """

    def __init__(
        self,
        dino: str | os.PathLike[str] | None = None,
        clip: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

        self.device, self.dino, self.clip = device, None, None
        if dino is not None:
            self.dino_processor: Any = AutoImageProcessor.from_pretrained(dino, **options)
            self.dino: Any = (
                AutoModel.from_pretrained(dino, use_safetensors=True, **options).to(device).eval()
            )
        if clip is not None:
            self.clip_processor: Any = AutoProcessor.from_pretrained(clip, **options)
            loaded: Any = CLIPModel.from_pretrained(clip, use_safetensors=True, **options)
            self.clip: Any = loaded.to(device).eval()

    @torch.inference_mode()
    def measure(self, item: Item, result: Image.Image) -> dict[str, float]:
        """The models' MEASURES of the subject on white and the painted part; empty without models."""
        outline = item.subject_mask or im.alpha_mask(item.subject)
        subject = im.flatten(im.on_white(item.subject, outline))
        painted = im.flatten(result).crop(item.mask.getbbox())
        measured = {}
        if self.dino is not None:
            measured["dino"] = _cosine(*(self.dino_features(picture) for picture in (subject, painted)))
        if self.clip is not None:
            a, b = (self._clip_features(picture) for picture in (subject, painted))
            measured["clip_i"] = _cosine(a, b)
            if item.prompt:
                words = self.clip_processor(
                    text=[item.prompt], return_tensors="pt", padding=True, truncation=True
                )
                text = self.clip.get_text_features(**words.to(self.device))
                measured["clip_t"] = _cosine(getattr(text, "pooler_output", text), b)
        return measured

    def dino_features(self, picture: Image.Image) -> Tensor:
        """Features of the class token, (1, features)."""
        inputs = self.dino_processor(images=picture, return_tensors="pt").to(self.device)
        return self.dino(**inputs).last_hidden_state[:, 0]

    def _clip_features(self, picture: Image.Image) -> Tensor:
        inputs = self.clip_processor(images=picture, return_tensors="pt").to(self.device)
        found = self.clip.get_image_features(**inputs)
        return getattr(found, "pooler_output", found)  # a tensor before transformers 5


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a, b).mean())

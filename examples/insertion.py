"""Insert a subject into the hole of a photo, and see by how much each head gained.

    python examples/insertion.py [output folder]

The pictures are drawn, and the model is the tiny one that comes with flashbrush: it knows 64 x 64 pixels
around the hole. For photos, load "black-forest-labs/FLUX.1-Fill-dev" and leave out the four arguments of the
tiny model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import flashbrush
from flashbrush.integrations import InContextBrushPipeline


def draw() -> dict[str, Image.Image]:
    """A subject with its mask, and a scene with its hole."""
    subject, outline = Image.new("RGB", (96, 96), "black"), Image.new("L", (96, 96), 0)
    ImageDraw.Draw(subject).ellipse((16, 16, 80, 80), fill="gold")
    for x in range(16, 80, 12):
        ImageDraw.Draw(subject).line((x, 16, x, 80), fill="blue", width=4)
    ImageDraw.Draw(outline).ellipse((16, 16, 80, 80), fill=255)
    scene, hole = Image.new("RGB", (160, 120), (90, 120, 90)), Image.new("L", (160, 120), 0)
    ImageDraw.Draw(scene).rectangle((0, 80, 160, 120), fill=(120, 90, 60))
    ImageDraw.Draw(hole).ellipse((58, 38, 104, 84), fill=255)
    return {"subject": subject, "subject_mask": outline, "image": scene, "mask": hole}


def main(output: Path = Path()) -> None:
    pipe = InContextBrushPipeline.from_pretrained(flashbrush.tiny_fill(), dtype=torch.float32)
    result = pipe(
        "a yellow disc with blue stripes",
        **draw(),
        alpha_prompt=0.3,
        alpha_subject=0.3,
        seed=0,
        progress=False,
        # Of the tiny model: panels of 64 x 64 pixels, a hole of three quarters of a panel, 6 steps.
        width=64,
        height=64,
        padding_mask_crop=9,
        steps=6,
    )
    result.images[0].save(output / "insertion.png")
    result.diptychs[0].save(output / "insertion_diptych.png")
    gains = result.head_gains.mean((0, 1, 2))  # over steps, layers and batch
    print("mean gain of each head:", [round(gain, 3) for gain in gains.tolist()])
    print("written:", output / "insertion.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

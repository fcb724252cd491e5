"""A method on a diffusers pipeline: apply it, read its statistics, take it off again.

    python examples/diffusers_drop_in.py [output folder]

It runs the tiny model that comes with flashbrush. For the real one put "black-forest-labs/FLUX.1-Fill-dev" in
the place of flashbrush.tiny_fill(), and sizes of 768 x 1536.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxFillPipeline
from PIL import Image, ImageDraw

import flashbrush
from flashbrush.integrations import InContextBrush
from flashbrush.integrations.diffusers import apply

SIDE = 64  # pixels of a panel


def diptych_and_mask() -> tuple[Image.Image, Image.Image]:
    """Above a red disc on white, below a grey scene with a hole to paint into."""
    diptych = Image.new("RGB", (SIDE, 2 * SIDE), "white")
    draw = ImageDraw.Draw(diptych)
    draw.ellipse((14, 14, 50, 50), fill="red")
    draw.rectangle((0, SIDE, SIDE, 2 * SIDE), fill=(150, 160, 170))
    mask = Image.new("L", diptych.size, 0)
    ImageDraw.Draw(mask).ellipse((10, SIDE + 10, 54, SIDE + 54), fill=255)
    return diptych, mask


def main(output: Path = Path()) -> None:
    pipe = FluxFillPipeline.from_pretrained(flashbrush.tiny_fill(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    diptych, mask = diptych_and_mask()

    def paint() -> Image.Image:
        return pipe(
            "a red disc",
            image=diptych,
            mask_image=mask,
            width=SIDE,
            height=2 * SIDE,
            num_inference_steps=6,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
        ).images[0]

    stock = paint()
    with apply(pipe.transformer):  # without a method: the model's own attention, computed by flashbrush
        plain = paint()
    with apply(pipe.transformer, InContextBrush(alpha_prompt=0.5, alpha_subject=0.5), stats=True) as handle:
        brushed = paint()

    print("plain differs from diffusers by at most", difference(stock, plain), "of 255")
    print("the method changes pixels by up to", difference(stock, brushed))
    gains = torch.stack([record.stats.gain[0, :, -1] for record in handle.stats])  # (calls, heads)
    print(f"{len(handle.stats)} controlled calls; gains of heads from {gains.min():.2f} to {gains.max():.2f}")
    brushed.save(output / "drop_in.png")


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

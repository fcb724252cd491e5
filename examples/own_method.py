"""A method of your own: the prompt weighs more at first, and fades to what it was.

    python examples/own_method.py [output folder]

docs/how-to/new-method.md explains it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxFillPipeline
from PIL import Image, ImageDraw

import flashbrush as fb
from flashbrush.integrations.diffusers import Layer, Plan, Step, apply

STEPS = 6


@dataclass
class FadingPrompt:
    """Image tokens read `first` times as much from the prompt at the first step, once as much at the last."""

    first: float = 2.0

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if not layer.text_len or not step.count:
            return None  # plain attention
        left = 1 - step.index / max(step.count - 1, 1)
        tokens = fb.Segments(prompt=layer.text_len, image=layer.image_len)
        return Plan(fb.Control(tokens, weight={("image", "prompt"): 1 + (self.first - 1) * left}))


def main(output: Path = Path()) -> None:
    pipe = FluxFillPipeline.from_pretrained(fb.tiny_fill(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    diptych, mask = Image.new("RGB", (64, 128), "white"), Image.new("L", (64, 128), 0)
    ImageDraw.Draw(diptych).ellipse((14, 14, 50, 50), fill="red")
    ImageDraw.Draw(mask).rectangle((12, 76, 52, 116), fill=255)

    with apply(pipe.transformer, FadingPrompt(), stats=True) as handle:
        handle.set_step(0, STEPS)  # the method wants to know how many steps there are

        def next_step(pipe, index: int, timestep, tensors: dict) -> dict:
            handle.set_step(index + 1, STEPS)
            return tensors

        image = pipe(
            "a blue disc",
            image=diptych,
            mask_image=mask,
            width=64,
            height=128,
            num_inference_steps=STEPS,
            max_sequence_length=16,
            callback_on_step_end=next_step,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    image.save(output / "own_method.png")
    mass = [float(record.stats.mass[0, :, 1, 0].mean()) / 128 for record in handle.stats if record.layer == 0]
    print("what image tokens give to the prompt, by step:", [round(share, 3) for share in mass])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""Visual in-context learning: do to an image what a pair of images shows (SD-VICL).

    python examples/visual_in_context.py [output folder]

No Stable Diffusion of a few megabytes exists, so this one has a UNet with random weights, beside the
autoencoder and the text encoder of flashbrush's tiny model. All steps of the method run; the prediction
itself means nothing. For one that does, load "stable-diffusion-v1-5/stable-diffusion-v1-5" with
VisualICLPipeline.from_pretrained.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextModel, CLIPTokenizer

import flashbrush
from flashbrush.integrations import VisualICLPipeline, VisualInContext


def random_stable_diffusion() -> StableDiffusionPipeline:
    """A StableDiffusionPipeline whose UNet is random."""
    folder = flashbrush.tiny_fill()
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=text.config.hidden_size,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def picture(centre: tuple[int, int], colour: str, mask: bool = False) -> Image.Image:
    """A disc on grey, or its mask in white on black."""
    image = Image.new("RGB", (64, 64), "black" if mask else "grey")
    x, y = centre
    ImageDraw.Draw(image).ellipse((x - 14, y - 14, x + 14, y + 14), fill="white" if mask else colour)
    return image


def main(output: Path = Path()) -> None:
    with tempfile.TemporaryDirectory() as cache:  # of the inversions, else in the user's cache folder
        pipe = VisualICLPipeline(random_stable_diffusion(), cache=cache)
        result = pipe(
            [(picture((24, 24), "red"), picture((24, 24), "red", mask=True))],  # an image and its mask
            picture((40, 36), "blue"),
            task="segmentation",
            method=VisualInContext(temperature=0.4, contrast=1.67),
            steps=12,
            skip=2,
            seed=0,
            progress=False,
        )
    result.picture.save(output / "visual_in_context.png")
    print("prediction:", result.data.shape, "of", result.data.dtype)
    print("written:", output / "visual_in_context.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""Tiny random Stable Diffusion checkpoints in diffusers' folder format, built offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_TOKENS, TEXT_WIDTH = 8, 16
CELL = 8  # pixels of a latent
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """Two resolutions and the middle, attention in each, 2 heads of 8; random weights under which attention
    matters.
    """
    generator = torch.Generator().manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 16),
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config | changes).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn" in name and parameter.dim() == 2:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                )
    return unet


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=4.0,
    ).eval()


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's, whose words are single letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_TOKENS)


def tiny_sd(folder: Path, **unet: Any) -> Path:
    """A checkpoint of StableDiffusionPipeline at `folder` / "model", with SD 1.5's scheduler."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=54,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tiny_tokenizer(folder / "words"),
        unet=tiny_unet(**unet),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


def ddim(**changes: Any) -> DDIMScheduler:
    """With SD 1.5's levels."""
    options: dict[str, Any] = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, **changes}
    return DDIMScheduler(**options)

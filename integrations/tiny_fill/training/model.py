"""The tiny FLUX.1-Fill: the classes and configuration keys of the real model, with small numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.words import TEXT_TOKENS, tokenizer, vocabulary
from .autoencoder import CELL, CHANNELS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

TEXT_WIDTH = 64
PACKED = 4 * CHANNELS  # of a token: 2x2 latents


def transformer() -> FluxTransformer2DModel:
    """A new transformer of 7.1 million parameters: 3 double and 5 single blocks, 6 heads of 32.

    Every block starts as the identity (adaLN-Zero, arXiv 2212.09748). The norms of q and k start with larger
    gains, as copying needs sharp attention.
    """
    from diffusers import FluxTransformer2DModel

    made = FluxTransformer2DModel(
        in_channels=PACKED + PACKED + 4 * CELL * CELL,  # noisy latents, masked photo's latents, mask pixels
        out_channels=PACKED,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    for name, part in made.named_modules():
        if isinstance(part, nn.Linear):
            last = name == "proj_out" or ".norm" in name or name.startswith("norm_out")
            nn.init.zeros_(part.weight) if last else nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
    for parameter in sharpness(made):
        nn.init.constant_(parameter, 1.5)
    return made


def sharpness(transformer: nn.Module) -> list[nn.Parameter]:
    """The gains of the q and k norms, which scale the logits."""
    gains = (".norm_q.", ".norm_k.", ".norm_added_")
    return [
        parameter for name, parameter in transformer.named_parameters() if any(gain in name for gain in gains)
    ]


def clip(seed: int) -> CLIPTextModel:
    """A random CLIP encoder whose pooled output is 0, so that a prompt acts through attention alone."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = vocabulary()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(ids),
                hidden_size=TEXT_WIDTH,
                intermediate_size=TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=TEXT_TOKENS,
                bos_token_id=ids["<s>"],
                eos_token_id=ids["</s>"],
                pad_token_id=ids["<pad>"],
            )
        )
    for name, parameter in made.named_parameters():
        if "final_layer_norm" in name:
            torch.nn.init.zeros_(parameter)
    return made.eval().requires_grad_(False)


def t5(seed: int) -> T5EncoderModel:
    """A random one-layer T5 encoder: a vector for each word, with a little of its neighbours mixed in."""
    from transformers import T5Config, T5EncoderModel

    ids = vocabulary()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = T5EncoderModel(
            T5Config(
                vocab_size=len(ids),
                d_model=TEXT_WIDTH,
                d_kv=16,
                d_ff=TEXT_WIDTH,
                num_layers=1,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                pad_token_id=ids["<pad>"],
                eos_token_id=ids["</s>"],
            )
        )
    return made.eval().requires_grad_(False)


def save(
    folder: str | os.PathLike[str], transformer: FluxTransformer2DModel, vae: AutoencoderKL, seed: int
) -> Path:
    """Write a checkpoint for FluxFillPipeline.from_pretrained: safetensors, bfloat16.

    Args:
        folder: created if it does not exist.
        transformer: converted to bfloat16 in place.
        vae: converted to bfloat16 in place.
        seed: of the random text encoders.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline

    names: Any = tokenizer()
    pipe = FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, max_shift=1.15),
        vae=vae.bfloat16(),
        text_encoder=clip(seed).bfloat16(),
        tokenizer=names,
        text_encoder_2=t5(seed).bfloat16(),
        tokenizer_2=names,
        transformer=transformer.bfloat16(),
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


class Prompts:
    """Embeds prompts as FluxFillPipeline does.

    Args:
        seed: of the random text encoders.
        device: of the embeddings.
    """

    def __init__(self, seed: int, device: str | torch.device = "cpu") -> None:
        encoder: Any = t5(seed).bfloat16().float()  # transformers' `to` is typed by a decorator
        self.words, self.encoder, self.device = tokenizer(), encoder.to(device), device

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Embeddings, (n, TEXT_TOKENS, TEXT_WIDTH)."""
        ids = self.words(
            prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        return self.encoder(ids.input_ids.to(self.device))[0]


def pack(latents: Tensor) -> Tensor:
    """Latents (n, channels, height, width) as FluxPipeline's tokens (n, height * width / 4, 4 channels)."""
    n, channels, height, width = latents.shape
    cells = latents.view(n, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(n, height // 2 * (width // 2), 4 * channels)


def pack_mask(masks: Tensor) -> Tensor:
    """Masks (n, 1, pixels, pixels) as tokens (n, tokens, 4 CELL^2), as in FluxFillPipeline."""
    n, _, height, width = masks.shape
    cells = masks.view(n, height // CELL, CELL, width // CELL, CELL).permute(0, 2, 4, 1, 3)
    return pack(cells.reshape(n, CELL * CELL, height // CELL, width // CELL))


def token_places(height: int, width: int) -> Tensor:
    """Ids of image tokens, (tokens, 3): 0, row, column."""
    places = torch.zeros(height, width, 3)
    places[..., 1] = torch.arange(height)[:, None]
    places[..., 2] = torch.arange(width)
    return places.reshape(-1, 3)

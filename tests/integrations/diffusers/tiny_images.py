"""Tiny random models that take latents as images: UNets of every family, and SD 3."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

SIDE, TEXT, TEXT_CHANNELS = 8, 5, 12
SD15 = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,  # the number of heads, despite diffusers' name
}
SD2 = SD15 | {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
SDXL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}
ODD_HEADS = SD15 | {"block_out_channels": (40, 80), "attention_head_dim": (4, 4), "norm_num_groups": 4}
PLAIN_ATTENTION = {
    "block_out_channels": (32, 64),
    "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 8,
    "resnet_out_scale_factor": 1.0,
}
CROSS_ONLY = SD15 | {"only_cross_attention": (True, False)}
ADDED = {
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 16,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim_type": "text_proj",
    "encoder_hid_dim": 6,
    "cross_attention_dim": 32,
}
ADDED_ONLY = ADDED | {
    "mid_block_only_cross_attention": True,
    "cross_attention_norm": "layer_norm",
    "cross_attention_dim": 64,
}
CONFIGS = {
    "SD 1.5": SD15,
    "SD 2": SD2,
    "SDXL": SDXL,
    "heads of 10 and 20": ODD_HEADS,
    "without transformers": PLAIN_ATTENTION,
    "cross attention twice": CROSS_ONLY,
    "added keys": ADDED,
    "added keys only": ADDED_ONLY,
}


def randomise(model: nn.Module, sharpness: float = 2.0) -> None:
    """Every parameter random, and logits large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() <= 1:
                parameter.copy_(0.2 * noise)
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(
                    noise * fan_in**-0.5 * (sharpness if "to_q" in name or "to_k" in name else 1.0)
                )


def tiny_unet(config: dict = SD15, **more) -> UNet2DConditionModel:
    """Two resolutions, 8 x 8 and 4 x 4 for the default latents; one resnet with attention a block, two on the
    way up.
    """
    settings = {
        "sample_size": SIDE,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_CHANNELS,
    }
    model = UNet2DConditionModel(**(settings | config | more)).eval()
    randomise(model)
    return model


def unet_call(
    model: UNet2DConditionModel, *, batch: int = 2, side: tuple[int, int] = (SIDE, SIDE), text: int = TEXT
) -> dict:
    """Arguments of model.forward."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    channels = config["encoder_hid_dim"] or config["cross_attention_dim"]
    call: dict = {
        "sample": torch.randn(batch, config["in_channels"], *side, generator=generator),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(batch, text, channels, generator=generator),
    }
    if config["addition_embed_type"] == "text_time":
        pooled = torch.randn(batch, 8, generator=generator)
        sizes = torch.randint(0, 64, (batch, 6), generator=generator).float()
        call["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return call


def tiny_sd3(
    *, dual: tuple[int, ...] = (), qk_norm: str | None = None, layers: int = 3
) -> SD3Transformer2DModel:
    """4 heads of 8; the last block does not return the text, as in the real model."""
    model = SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_CHANNELS,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    ).eval()
    randomise(model)
    return model


def sd3_call(*, batch: int = 2, side: tuple[int, int] = (SIDE, SIDE), text: int = TEXT) -> dict[str, Tensor]:
    """Arguments of SD3Transformer2DModel.forward."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, *side, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, TEXT_CHANNELS, generator=generator),
        "pooled_projections": torch.randn(batch, 16, generator=generator),
        "timestep": torch.full((batch,), 300.0),
    }

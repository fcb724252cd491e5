"""Tiny random FLUX transformers, and calls of them."""

from __future__ import annotations

import copy

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

TEXT, ROWS, COLUMNS = 7, 6, 4  # text tokens; grid of image tokens: a vertical diptych of two panels of 3 x 4


def tiny_flux(
    *,
    double: int = 2,
    single: int = 2,
    heads: int = 4,
    head_dim: int = 32,
    in_channels: int = 8,
    out_channels: int = 8,
    joint: int = 16,
    pooled: int = 16,
) -> FluxTransformer2DModel:
    """Two blocks of each kind, 4 heads of 32; every parameter is random, and attention matters to the output.

    Fresh diffusers models have unit norms and small weights, under which a control has little effect.
    """
    generator = torch.Generator().manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=joint,
        pooled_projection_dim=pooled,
        axes_dims_rope=(head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm_" in name and "linear" not in name and "norm_out" not in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def tiny_call(
    model: FluxTransformer2DModel, *, batch: int = 1, text: int = TEXT, rows: int = ROWS
) -> dict[str, Tensor]:
    """Arguments of model.forward for `rows` x COLUMNS image tokens."""
    generator = torch.Generator().manual_seed(1)
    config, tokens = model.config, rows * COLUMNS
    ids = torch.zeros(tokens, 3)
    ids[:, 1] = torch.arange(tokens) // COLUMNS
    ids[:, 2] = torch.arange(tokens) % COLUMNS
    return {
        "hidden_states": torch.randn(batch, tokens, config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


@torch.no_grad()
def forward(model: FluxTransformer2DModel, call: dict[str, Tensor], **more) -> Tensor:
    return model(**call, **more, return_dict=False)[0]


def in_double(model: nn.Module, call: dict) -> tuple[nn.Module, dict]:
    """A copy of the model and its call in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    return copy.deepcopy(model).double(), wide


def relative(a: Tensor, b: Tensor) -> float:
    """max abs(a - b) / max abs(b)"""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())

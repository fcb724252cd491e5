"""The tiny model's AutoencoderKL: an encoder set to principal components, and a trained decoder.

A latent holds the CHANNELS strongest principal components of a 4x4 cell of pixels, with the weaker ones
amplified (BOOST). A linear encoder needs no training, and it is a single convolution while the transformer
trains. AutoencoderKL's convolutions compute the same once the residual branches are set to 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..data.canvases import canvases
from ..data.photos import Photos

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CHANNELS = 8
CELL = 4  # pixels of a latent, each way
BOOST = 0.5  # a component is divided by this power of its standard deviation
GROUPS = 8  # of channels, in every norm
PEG = 512.0  # far above any activation, see _set_last


def principal_components(photos: Photos, generator: Generator, count: int = 1024) -> tuple[Tensor, Tensor]:
    """Weight (CHANNELS, 3, CELL, CELL) and bias (CHANNELS,) of the encoder.

    Latents are F.conv2d(pixels in [-1, 1], weight, bias, stride=CELL). Over all cells of `count` canvases,
    half of them with the hole cut out, the latents' mean is 0 and their mean square 1.
    """
    total, products, seen = (
        torch.zeros(3 * CELL**2).double(),
        torch.zeros(3 * CELL**2, 3 * CELL**2).double(),
        0,
    )
    for _ in range(count // 32):
        some = canvases(32, photos, generator)
        pixels = 2 * some.pictures - 1
        pixels[::2] *= 1 - some.masks[::2]
        cells = F.unfold(pixels, CELL, stride=CELL).transpose(1, 2).flatten(0, 1).double().cpu()
        total, products, seen = total + cells.sum(0), products + cells.T @ cells, seen + len(cells)
    mean = total / seen
    variances, vectors = torch.linalg.eigh(products / seen - torch.outer(mean, mean))
    deviations, vectors = variances.flip(0)[:CHANNELS].sqrt(), vectors.flip(1)[:, :CHANNELS]
    vectors = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)
    latents = deviations ** (1 - BOOST)
    weight = vectors / deviations**BOOST / latents.square().mean().sqrt()
    return weight.T.reshape(CHANNELS, 3, CELL, CELL).float(), -(mean @ weight).float()


def autoencoder(weight: Tensor, bias: Tensor) -> AutoencoderKL:
    """An AutoencoderKL with the encoder of these components and an untrained decoder."""
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {  # annotated as tuples of one in diffusers
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 64),
    }
    vae = AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=GROUPS,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    _set_encoder(vae.encoder, weight.cpu(), bias.cpu())
    vae.encoder.requires_grad_(False)
    return vae


@torch.no_grad()
def _set_encoder(encoder: Any, weight: Tensor, bias: Tensor) -> None:
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias") or ".conv2." in name:  # conv2 is the end of a residual branch
            parameter.zero_()
    # The stride-2 convolutions pad right and below only: their first 2x2 taps are a pixel's own block.
    rgb = torch.zeros(16, 3, 3, 3)
    rgb[:3, :, 1, 1] = torch.eye(3)
    encoder.conv_in.weight.copy_(rgb)
    gather = torch.zeros(16, 16, 3, 3)  # channel 4 c + 2 y + x is colour c at (y, x) of a 2x2 block
    combine = torch.zeros(32, 32, 3, 3)
    for place in range(4):
        y, x = divmod(place, 2)
        for colour in range(3):
            gather[4 * colour + place, colour, y, x] = 1
            for inner in range(4):
                b, a = divmod(inner, 2)
                combine[:CHANNELS, 4 * colour + inner, y, x] = weight[:, colour, 2 * y + b, 2 * x + a]
    encoder.down_blocks[0].downsamplers[0].conv.weight.copy_(gather)
    first, last = (
        encoder.down_blocks[1].resnets[0].conv_shortcut,
        encoder.down_blocks[2].resnets[0].conv_shortcut,
    )
    first.weight.copy_(torch.eye(32, 16)[:, :, None, None])
    encoder.down_blocks[1].downsamplers[0].conv.weight.copy_(combine)
    encoder.down_blocks[1].downsamplers[0].conv.bias[:CHANNELS] = bias
    _set_last(encoder, last)


def _set_last(encoder: Any, before: nn.Conv2d) -> None:
    """Make the last norm and SiLU the identity on latents, through the convolutions `before` and conv_out.

    A group of the norm's channels holds latents and their negatives, so its mean is 0, and two constants, PEG
    and -PEG, so large that they alone decide its variance; the norm's weight undoes the division. conv_out
    subtracts: silu(x) - silu(-x) = x.
    """
    size = encoder.conv_norm_out.num_channels // GROUPS
    each = (size - 2) // 2
    before.weight.zero_()
    encoder.conv_out.weight.zero_()
    for latent in range(CHANNELS):
        group, place = divmod(latent, each)
        for channel, sign in ((group * size + place, 1.0), (group * size + each + place, -1.0)):
            before.weight[channel, latent] = sign
            encoder.conv_out.weight[latent, channel, 1, 1] = sign
    pegs = before.bias
    assert pegs is not None
    pegs.view(GROUPS, size)[:, -2:] = torch.tensor([PEG, -PEG])
    encoder.conv_norm_out.weight.fill_(PEG * (2 / size) ** 0.5)
    encoder.conv_out.bias[CHANNELS:] = -12.0  # log variance

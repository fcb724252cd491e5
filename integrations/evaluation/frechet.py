"""Fréchet distance between two sets of pictures (FID), and the autoencoder's own features for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..pipelines import images as im


def frechet_distance(features: nn.Module, found: list[Image.Image], real: list[Image.Image]) -> float:
    """The Fréchet distance between two sets of pictures of one size, by torchmetrics.

    Args:
        features: module from (n, 3, height, width) uint8 to (n, features).
        found: the results.
        real: the truths.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=features, input_img_size=(3, real[0].height, real[0].width))
    for pictures, is_real in ((found, False), (real, True)):
        stack = torch.stack([torch.from_numpy(np.array(im.flatten(p))).permute(2, 0, 1) for p in pictures])
        metric.update(stack, real=is_real)
    return float(metric.compute())


class LatentStatistics(nn.Module):
    """Mean and deviation of each latent channel of an autoencoder: features that need no other model.

    Args:
        vae: an AutoencoderKL.
        device: where it runs; None: where its weights are, which is not the same while it is offloaded.
    """

    def __init__(self, vae: Any, device: torch.device | None = None) -> None:
        super().__init__()
        self.vae, self.device = vae, device
        self.num_features = 2 * vae.config.latent_channels

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        inputs = pictures.to(self.device or self.vae.device, self.vae.dtype) / 127.5 - 1
        latents = self.vae.encode(inputs).latent_dist.mode().float()
        return torch.cat([latents.mean((2, 3)), latents.std((2, 3))], 1).to(pictures.device)

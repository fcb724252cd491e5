"""Sampling from a model in training, and measuring the result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..data.canvases import Canvases, canvases
from . import model
from .state import Training, copies

STEPS = 12


def fill(training: Training, some: Canvases, generator: Generator) -> dict[str, float]:
    """Fill the holes of canvases, and measure the pictures nearest to the latents.

    Returns:
        "psnr" in the hole, dB, and "pattern", the correlation over the subject's pixels; means over the
        canvases.
    """
    n = len(some.prompts)
    conditions = training.conditions(some)
    latents = model.pack(training.encode(some.pictures))
    latents = torch.randn(latents.shape, generator=generator).to(latents)
    guidance = torch.full((n,), 30.0, device=latents.device)
    shift = 1.6  # the scheduler's for this number of tokens
    levels = torch.linspace(1, 0, STEPS + 1)
    levels = shift * levels / (1 + (shift - 1) * levels)
    for level, following in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        velocity = training.velocity(latents, torch.full((n,), level).to(latents), conditions, guidance)
        latents = latents + (following - level) * velocity
    found = _pixels(training, latents, some.pictures.shape)
    return {
        "psnr": float(psnr(found, some.pictures, some.masks).mean()),
        "pattern": float(pattern(found, some).mean()),
    }


@torch.no_grad()
def judge(training: Training, count: int = 32) -> dict[str, float]:
    """Measures of the averaged weights on held-out photos and new subjects, for poses of freedom 0 and 1.

    Returns:
        "psnr 0", "pattern 0", "psnr 1" and "pattern 1", see fill().
    """
    trained = copies(training.transformer)
    training.transformer.load_state_dict(training.averages["transformer"])
    measured = {}
    for freedom in (0.0, 1.0):
        generator = Generator().manual_seed(10**9)
        some = canvases(count, training.seen["held out"], generator, freedom, kind="reference")
        measured |= {f"{name} {freedom:g}": value for name, value in fill(training, some, generator).items()}
    training.transformer.load_state_dict(trained)
    return measured


def _pixels(training: Training, tokens: Tensor, shape: torch.Size) -> Tensor:
    """The picture in [0, 1] whose latents are nearest to packed latents, by the encoder's pseudoinverse."""
    n, _, height, width = shape
    cells = tokens.view(n, height // 8, width // 8, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    cells = cells.reshape(n, -1, height // 4 * (width // 4)) - training.bias[:, None]
    inverse = torch.linalg.pinv(training.weight.flatten(1))  # (48, channels)
    return ((F.fold(inverse @ cells, (height, width), 4, stride=4) + 1) / 2).clamp(0, 1)


def psnr(found: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """PSNR of pictures in [0, 1] over the pixels where `where` (n, 1, height, width) is 1: (n,) dB."""
    error = ((found - truth).square() * where).sum((1, 2, 3)) / (3 * where.sum((1, 2, 3))).clamp(min=1)
    return -10 * error.clamp(min=1e-10).log10()


def pattern(found: Tensor, some: Canvases) -> Tensor:
    """Correlation with the truth over the subject's pixels, less each channel's mean: (n,) in [-1, 1]."""
    weight = (some.coverage > 0.5).float()
    count = weight.sum((2, 3), keepdim=True).clamp(min=1)

    def centred(pictures: Tensor) -> Tensor:
        return (pictures - (pictures * weight).sum((2, 3), keepdim=True) / count) * weight

    a, b = centred(found), centred(some.pictures)
    return (a * b).sum((1, 2, 3)) / (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).sqrt().clamp(
        min=1e-6
    )

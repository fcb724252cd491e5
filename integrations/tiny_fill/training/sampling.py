"""Filling holes with a model in training, and how well it does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..data.canvases import Canvases, canvases
from . import model
from .state import Training, copies

STEPS = 12


def fill(training: Training, some: Canvases, generator: Generator) -> dict[str, float]:
    """`psnr` (dB) in the hole and `pattern`, see judge.py, of what the components of the latents can show."""
    n = len(some.prompts)
    conditions = training.conditions(some)
    latents = model.pack(training.encode(some.pictures))
    latents = torch.randn(latents.shape, generator=generator).to(latents)
    guidance = torch.full((n,), 30.0, device=latents.device)
    shift = 1.6  # what the scheduler makes of this number of tokens
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
    """PSNR in the hole and correlation of the pattern, on subjects of photos and seeds that are not learned
    from.
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
    """The nearest picture, in [0, 1], to the packed latents."""
    n, _, height, width = shape
    cells = tokens.view(n, height // 8, width // 8, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    cells = cells.reshape(n, -1, height // 4 * (width // 4)) - training.bias[:, None]
    inverse = torch.linalg.pinv(training.weight.flatten(1))  # (48, channels)
    return ((F.fold(inverse @ cells, (height, width), 4, stride=4) + 1) / 2).clamp(0, 1)


def psnr(found: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """(n,) dB, over the pixels where `where` (n, 1, height, width) is 1; pictures are in [0, 1]."""
    error = ((found - truth).square() * where).sum((1, 2, 3)) / (3 * where.sum((1, 2, 3))).clamp(min=1)
    return -10 * error.clamp(min=1e-10).log10()


def pattern(found: Tensor, some: Canvases) -> Tensor:
    """(n,) in [-1, 1]: Pearson's correlation over the subject's pixels, each channel's mean taken away."""
    weight = (some.coverage > 0.5).float()
    count = weight.sum((2, 3), keepdim=True).clamp(min=1)

    def centred(pictures: Tensor) -> Tensor:
        return (pictures - (pictures * weight).sum((2, 3), keepdim=True) / count) * weight

    a, b = centred(found), centred(some.pictures)
    return (a * b).sum((1, 2, 3)) / (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).sqrt().clamp(
        min=1e-6
    )

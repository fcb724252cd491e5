"""DDIM inversion (arXiv 2010.02502, 2105.05233): the noise from which deterministic sampling gives an image.

MasaCtrl, Plug-and-Play and Prompt-to-Prompt edit photos from there: source and edit start from the same
noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..shared.arguments import check_count
from .ddpm import DDPMSchedule, Predict


@torch.no_grad()
def invert(
    clean: Tensor,
    predict: Predict,
    schedule: DDPMSchedule,
    *,
    iterations: int = 1,
    progress: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """The latents of all levels from `clean` to noise: each step of sample(), inverted.

    A step of sample() to the cleaner level i + 1 is x_i+1 = sqrt(ab_i+1) x0 + sqrt(1 - ab_i+1) eps, with x0
    and eps of x_i. The inverse step does not know x_i and takes eps of x_i+1, at the timestep of level i, as
    in MasaCtrl's code; its error is the change of eps within a step. Each further iteration takes eps of the
    x_i found last, which converges to the exact inverse where steps are small.

    Args:
        clean: (images, channels, height, width), latents as the model was trained on.
        predict: the model; MasaCtrl and Plug-and-Play invert without guidance, MasaCtrl with an empty prompt.
        schedule: levels of noise, as from DDPMSchedule.from_scheduler(); its eta is not used.
        iterations: calls of the model in each step.
        progress: called with 1 after each step.

    Returns:
        (images, steps + 1, channels, height, width) float32: [:, 0] is the noise to start from, [:, -1] is
        `clean`.

    Raises:
        ValueError: clean of another rank, no iteration, or a first level without signal.
        FloatingPointError: the model's output is not finite.
    """
    if clean.dim() != 4:
        raise ValueError(f"clean: expected shape (images, channels, height, width), got {tuple(clean.shape)}")
    check_count("iterations", iterations)
    latents = [clean.float()]
    for i in reversed(range(schedule.steps)):
        now, then = schedule.alphas[i].item(), schedule.alphas[i + 1].item()
        after = found = latents[-1]
        for _ in range(iterations):
            _, noise = _parts(found, _output(found, predict, schedule, i), schedule, i)
            start = (after - (1 - then) ** 0.5 * noise) / then**0.5
            found = now**0.5 * start + (1 - now) ** 0.5 * noise
        if not bool(found.isfinite().all()):
            raise FloatingPointError("the model's output is not finite: try another dtype")
        latents.append(found)
        progress(1)
    return torch.stack(latents[::-1], 1)


@torch.no_grad()
def sample(latents: Tensor, predict: Predict, schedule: DDPMSchedule) -> Tensor:
    """Deterministic sampling: DDIM with eta 0, without clipping.

    Args:
        latents: (images, channels, height, width), of the first level.
        predict: the model.
        schedule: as in invert().

    Returns:
        (images, steps + 1, channels, height, width) float32, the latents of all levels.
    """
    levels = [latents.float()]
    for i in range(schedule.steps):
        levels.append(step(levels[-1], _output(levels[-1], predict, schedule, i), schedule, i))
    return torch.stack(levels, 1)


def step(latents: Tensor, output: Tensor, schedule: DDPMSchedule, index: int) -> Tensor:
    """The latents of the next level: sqrt(ab_i+1) x0 + sqrt(1 - ab_i+1) eps.

    Args:
        latents: (images, channels, height, width) float32, of level `index`.
        output: of the model, after guidance.
        schedule: as in invert().
        index: of the level, from 0 to schedule.steps - 1.
    """
    then = schedule.alphas[index + 1].item()
    start, noise = _parts(latents, output, schedule, index)
    return then**0.5 * start + (1 - then) ** 0.5 * noise


def _output(latents: Tensor, predict: Predict, schedule: DDPMSchedule, index: int) -> Tensor:
    return predict(latents, schedule.timesteps[index].to(latents.device).expand(len(latents))).float()


def _parts(latents: Tensor, output: Tensor, schedule: DDPMSchedule, index: int) -> tuple[Tensor, Tensor]:
    """(x0, eps) of latents of a level, by the model's output."""
    signal, spread = schedule.alphas[index].item() ** 0.5, (1 - schedule.alphas[index].item()) ** 0.5
    if schedule.prediction == "v_prediction":
        return signal * latents - spread * output, signal * output + spread * latents
    return (latents - spread * output) / signal, output

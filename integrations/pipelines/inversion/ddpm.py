"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al., arXiv 2304.06140): the noise maps of an image.

Sampling from the inversion's first latents with its noise maps reproduces its latents. Sampling with another
model, or with controlled attention, gives another image of the same structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..shared.arguments import check_count

# (latents (n, channels, height, width) float32, timesteps (n,)) -> the model's outputs
Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class DDPMSchedule:
    """Levels of noise, and the step from one to the next.

    Step i goes from latents i, at timesteps[i], to latents i + 1, with ab = alphas:

        x0    = (x - sqrt(1 - ab_i) eps) / sqrt(ab_i)
        var_i = (1 - ab_i+1) / (1 - ab_i) (1 - ab_i / ab_i+1)
        mu_i  = sqrt(ab_i+1) x0 + sqrt(1 - ab_i+1 - eta var_i) eps
        x_i+1 = mu_i + eta sqrt(var_i) z_i

    as in arXiv 2304.06140, its released code, and cross-image attention's; x0 is not clipped.

    Args:
        timesteps: (steps,) int64, the noisiest first.
        alphas: (steps + 1,) float64: the cumulative products at the timesteps, and of the clean latents.
        prediction: the model's output: "epsilon" or "v_prediction".
        eta: in (0, 1]; 1 is DDPM. Below 1 the published formula above differs from DDIM's, which has eta^2.

    Raises:
        ValueError: no steps; shapes that do not match; alphas that do not rise within [0, 1]; an unknown
            prediction or an eta out of range; "epsilon" with a first level without signal, where x0 is
            undefined.
    """

    timesteps: Tensor
    alphas: Tensor
    prediction: str = "epsilon"
    eta: float = 1.0

    def __post_init__(self) -> None:
        steps = self.timesteps.numel()
        if steps < 1 or self.alphas.shape != (steps + 1,):
            shapes = tuple(self.timesteps.shape), tuple(self.alphas.shape)
            raise ValueError(
                f"timesteps: expected (steps,) and alphas (steps + 1,), got {shapes[0]} and {shapes[1]}"
            )
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction: expected epsilon or v_prediction, got {self.prediction!r}")
        if not isinstance(self.eta, (int, float)) or not 0 < self.eta <= 1:
            raise ValueError(f"eta: expected a number above 0 and up to 1, got {self.eta!r}")
        levels = self.alphas.tolist()
        if not levels[0] >= 0 or not levels[-1] <= 1 or any(a >= b for a, b in pairwise(levels)):
            raise ValueError("alphas: expected levels that rise within [0, 1]")
        if self.prediction == "epsilon" and levels[0] == 0:
            raise ValueError(
                "prediction: at the first level nothing but noise is left, where epsilon does not give x0"
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any, steps: int, eta: float = 1.0) -> DDPMSchedule:
        """The schedule of a diffusers scheduler for a number of steps.

        Args:
            scheduler: a DDIMScheduler or DDPMScheduler; its own state is not changed.
            steps: of the whole run.
            eta: as in the class.

        Raises:
            TypeError: another scheduler.
            ValueError: steps that the scheduler cannot take, or another prediction type.
        """
        from diffusers import DDIMScheduler, DDPMScheduler

        if not isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
            raise TypeError(
                f"scheduler: expected a DDIMScheduler or a DDPMScheduler, got {type(scheduler).__name__}"
            )
        own: Any = type(scheduler).from_config(scheduler.config)
        most = own.config.num_train_timesteps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
            raise ValueError(f"steps: expected an integer from 1 to {most}, got {steps!r}")
        own.set_timesteps(steps)
        timesteps = own.timesteps.cpu().to(torch.int64)
        if (last := int(timesteps.max())) >= most:
            raise ValueError(
                f"steps: {steps} steps with the scheduler's offset reach timestep {last}, "
                f"but it has {most}: take fewer"
            )
        # DDPM's clean latents have no noise; DDIM's may keep a little, as set_alpha_to_one decides.
        final = getattr(own, "final_alpha_cumprod", torch.tensor(1.0))
        alphas = torch.cat([own.alphas_cumprod[timesteps].double(), final.double().reshape(1)])
        return cls(timesteps, alphas, own.config.prediction_type, eta)

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return len(self.timesteps)

    @property
    def deviations(self) -> Tensor:
        """Factors of the noise maps, eta sqrt(var): (steps,) float64; 0 where the next level has no noise."""
        now, then = self.alphas[:-1], self.alphas[1:]
        return self.eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor | int) -> Tensor:
        """Latents of a level: sqrt(ab) clean + sqrt(1 - ab) noise.

        Args:
            clean: (n, channels, height, width).
            noise: the same.
            level: 0 to steps - 1: one for all, or (n,).
        """
        alpha = self._factors(self.alphas[level], clean)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def mean(self, latents: Tensor, output: Tensor, step: Tensor | int) -> Tensor:
        """mu of a step, (n, channels, height, width).

        Args:
            latents: before the step, (n, channels, height, width).
            output: of the model, of the same shape.
            step: one for all, or (n,).
        """
        now, then = (self.alphas[: self.steps][step], self.alphas[1:][step])
        variance = (1 - then) / (1 - now) * (1 - now / then)
        now, then = self._factors(now, latents), self._factors(then, latents)
        spread = self._factors((1 - self.alphas[1:][step] - self.eta * variance).clamp_min(0), latents)
        if self.prediction == "epsilon":
            noise = output
            clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
        else:
            clean = now.sqrt() * latents - (1 - now).sqrt() * output
            noise = now.sqrt() * output + (1 - now).sqrt() * latents
        return then.sqrt() * clean + spread.sqrt() * noise

    def step(self, latents: Tensor, output: Tensor, step: int, noise_map: Tensor) -> Tensor:
        """The latents of the next level, mu + eta sqrt(var) z.

        Args:
            latents: before the step, as in mean().
            output: of the model, as in mean().
            step: index of the step.
            noise_map: z, of the latents' shape.
        """
        return self.mean(latents, output, step) + float(self.deviations[step]) * noise_map

    @staticmethod
    def _factors(values: Tensor, like: Tensor) -> Tensor:
        """Numbers () or (n,) of the CPU as (1 or n, 1, 1, 1), in the dtype and on the device of `like`."""
        return values.to(like.device, like.dtype).reshape(-1, 1, 1, 1)


@dataclass(frozen=True, eq=False)
class Inversion:
    """Latents and noise maps of inverted images, float32.

    Attributes:
        latents: (images, steps - skip + 1, channels, height, width): [:, 0] before step `skip`, [:, -1]
            clean.
        noise_maps: (images, steps - skip, channels, height, width): [:, 0] of step `skip`.
        skip: steps that were left out at the noisy end.
    """

    latents: Tensor
    noise_maps: Tensor
    skip: int = 0

    def at(self, step: int) -> Tensor:
        """The latents before a step of the whole run, counted from 0; of `steps` itself, the clean ones.

        Returns:
            (images, channels, height, width).
        """
        return self.latents[:, step - self.skip]

    def noise_map(self, step: int) -> Tensor:
        """z of a step of the whole run, counted from 0: (images, channels, height, width)."""
        return self.noise_maps[:, step - self.skip]


@torch.no_grad()
def invert(
    clean: Tensor,
    predict: Predict,
    schedule: DDPMSchedule,
    *,
    generators: Sequence[torch.Generator],
    skip: int = 0,
    keep_last: bool = False,
    batch: int = 8,
    progress: Callable[[int], object] = lambda done: None,
) -> Inversion:
    """The noise maps with which sampling passes through noised versions of `clean`: arXiv 2304.06140, sec. 3.

    Every level is noised independently, so the steps of an image go through the model in batches. An image's
    result does not depend on the other images.

    Args:
        clean: (images, channels, height, width), latents as the model was trained on.
        predict: the model, guidance included; its outputs are converted to float32.
        schedule: levels of noise.
        generators: one for each image. Levels are drawn from the clean end on, so `skip` does not change
            them.
        skip: steps left out at the noisy end.
        keep_last: whether the last noise map is kept. If not, as in the paper, it is 0 and the last step
            returns its mean.
        batch: steps in one call of the model.
        progress: called after each call of the model with its number of steps.

    Returns:
        Latents and noise maps of all images.

    Raises:
        ValueError: a number of generators, a skip or a batch out of range; keep_last where the last step adds
            no noise.
        FloatingPointError: the model's output is not finite.
    """
    if clean.dim() != 4:
        raise ValueError(f"clean: expected shape (images, channels, height, width), got {tuple(clean.shape)}")
    if len(generators) != len(clean):
        raise ValueError(f"generators: expected one for each of {len(clean)} images, got {len(generators)}")
    check_skip(skip, schedule.steps)
    check_count("batch", batch)
    deviations = schedule.deviations
    if keep_last and not deviations[-1] > 0:
        raise ValueError("keep_last: the scheduler's last step adds no noise, so no noise map can correct it")
    clean, count = clean.float(), schedule.steps - skip
    latents = torch.empty(len(clean), count + 1, *clean.shape[1:], device=clean.device)
    maps = torch.zeros(len(clean), count, *clean.shape[1:], device=clean.device)
    for image, generator in enumerate(generators):
        latents[image, -1] = clean[image]
        for i in reversed(range(count)):
            noise = torch.randn(clean.shape[1:], generator=generator, device=generator.device).to(clean)
            latents[image, i] = schedule.noisy(clean[image], noise, skip + i)[0]
        for start in range(0, count, batch):
            here = torch.arange(start, min(start + batch, count))
            steps = skip + here
            before, after = latents[image, here], latents[image, here + 1]
            output = predict(before, schedule.timesteps[steps].to(clean.device)).float()
            mean = schedule.mean(before, output, steps)
            scale = schedule._factors(deviations[steps], mean)
            found = torch.where(scale > 0, (after - mean) / scale, 0)
            if not bool(found.isfinite().all()):
                raise FloatingPointError("the model's output is not finite: try another dtype")
            maps[image, here] = found
            progress(len(here))
        if not keep_last:
            maps[image, -1] = 0
    return Inversion(latents, maps, skip)


@torch.no_grad()
def sample(inversion: Inversion, predict: Predict, schedule: DDPMSchedule) -> Tensor:
    """Sample from an inversion's first latents, adding its noise maps.

    Returns:
        The latents of all levels, (images, steps - skip + 1, channels, height, width) float32. With the
        `predict` of the inversion they equal its latents to rounding, except for the last level where its
        noise map is 0.
    """
    latents = [inversion.at(inversion.skip)]
    for step in range(inversion.skip, schedule.steps):
        times = schedule.timesteps[step].to(latents[-1].device).expand(len(latents[-1]))
        output = predict(latents[-1], times).float()
        latents.append(schedule.step(latents[-1], output, step, inversion.noise_map(step)))
    return torch.stack(latents, 1)


def noise_predictor(
    unet: Any, prompt: Tensor, negative: Tensor | None = None, guidance: float = 1.0
) -> Predict:
    """A diffusers UNet as `predict`, with classifier-free guidance (arXiv 2207.12598) unless that is 1.

    Args:
        unet: a UNet2DConditionModel; latents are cast to its dtype.
        prompt: embeddings of the text, (1, tokens, channels).
        negative: embeddings of the negative text; needed where guidance is not 1.
        guidance: output = negative's + guidance * (prompt's - negative's).

    Raises:
        ValueError: guidance without a negative prompt, or not finite.
    """
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance!r}")
    if guidance != 1 and negative is None:
        raise ValueError(f"guidance: {guidance:g} needs the embeddings of a negative prompt")

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        n = len(latents)
        inputs = latents.to(unet.dtype)
        if guidance == 1:
            return unet(inputs, timesteps, prompt.expand(n, -1, -1), return_dict=False)[0].float()
        assert negative is not None
        text = torch.cat([negative.expand(n, -1, -1), prompt.expand(n, -1, -1)])
        out = unet(torch.cat([inputs, inputs]), torch.cat([timesteps, timesteps]), text, return_dict=False)[0]
        without, given = out.float().chunk(2)
        return without + guidance * (given - without)

    return predict


def steps_left_out(skip: int | None, steps: int, released: tuple[int, int]) -> int:
    """The number of skipped steps.

    Args:
        skip: as asked for; None: as large a share of `steps` as in the released code.
        steps: of the whole run.
        released: (skip, steps) of the released code.

    Raises:
        ValueError: no step is left.
    """
    if skip is None:
        return steps * released[0] // released[1]
    check_skip(skip, steps)
    return skip


def check_skip(skip: int, steps: int) -> None:
    """Raise ValueError unless at least one step is left."""
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip < steps:
        raise ValueError(
            f"skip: expected an integer from 0 to {steps - 1}, as there are {steps} steps, got {skip!r}"
        )

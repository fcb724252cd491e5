"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al., arXiv 2304.06140): the noise maps of a given
image.

Sampling from the inversion's first latents with its own noise maps goes through its latents again; sampling
with another model, or with attention under control, gives another image of the same structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Predict = Callable[
    [Tensor, Tensor], Tensor
]  # (latents (n, c, h, w) float32, timesteps (n,)) -> the model's outputs


@dataclass(frozen=True, eq=False)
class DDPMSchedule:
    """Levels of noise, and the step from one to the next.

    Step i goes from latents i, at timesteps[i], to latents i + 1, with ab = alphas:

        x0    = (x - sqrt(1 - ab_i) eps) / sqrt(ab_i)
        var_i = (1 - ab_i+1) / (1 - ab_i) (1 - ab_i / ab_i+1)
        mu_i  = sqrt(ab_i+1) x0 + sqrt(1 - ab_i+1 - eta var_i) eps
        x_i+1 = mu_i + eta sqrt(var_i) z_i

    as in arXiv 2304.06140, its released code, and cross-image attention's; x0 is not clipped. A scheduler's
    next level is the one at the next of its timesteps.

    Args:
        timesteps: (steps,) int64, from the noisiest on.
        alphas: (steps + 1,) float64: the cumulative products at the timesteps, and of the clean latents.
        prediction: what the model predicts: "epsilon" or "v_prediction".
        eta: in (0, 1]; 1 is DDPM. Between 0 and 1 the published formula above differs from DDIM's, which has
            eta^2.

    Raises:
        ValueError: no steps, shapes that do not fit, alphas that do not rise within [0, 1], an eta or a
            prediction that does not exist; epsilon at a level without signal, from which no x0 follows.
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
        """The timesteps that diffusers' scheduler would set for `steps`.

        Args:
            scheduler: a DDIMScheduler or DDPMScheduler; its own state is left alone.
            steps: of the whole run. eta: as above.

        Raises:
            TypeError: another scheduler. ValueError: steps that it cannot take, another prediction type.
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
                f"steps: {steps} steps with the scheduler's offset reach timestep {last}, but it has {most}: take fewer"
            )
        # DDPM's clean latents have no noise at all; DDIM's have what set_alpha_to_one leaves.
        final = getattr(own, "final_alpha_cumprod", torch.tensor(1.0))
        alphas = torch.cat([own.alphas_cumprod[timesteps].double(), final.double().reshape(1)])
        return cls(timesteps, alphas, own.config.prediction_type, eta)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return len(self.timesteps)

    @property
    def deviations(self) -> Tensor:
        """(steps,) float64: eta sqrt(var), what a noise map is multiplied by; 0 where the next level has no
        noise.
        """
        now, then = self.alphas[:-1], self.alphas[1:]
        return self.eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor | int) -> Tensor:
        """Latents of a level, 0 to steps - 1, with independent noise: sqrt(ab) clean + sqrt(1 - ab) noise.

        Args:
            clean, noise: (n, channels, height, width). level: one for all, or (n,).
        """
        alpha = self._factors(self.alphas[level], clean)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def mean(self, latents: Tensor, output: Tensor, step: Tensor | int) -> Tensor:
        """mu of a step, (n, channels, height, width).

        Args:
            latents: of the level before it, (n, channels, height, width). output: of the model, of that
                shape.
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
        """The latents of the next level, mu + eta sqrt(var) z; arguments as in mean()."""
        return self.mean(latents, output, step) + float(self.deviations[step]) * noise_map

    @staticmethod
    def _factors(values: Tensor, like: Tensor) -> Tensor:
        """() or (n,) float64 numbers of the CPU, to be multiplied with (n, c, h, w)."""
        return values.to(like.device, like.dtype).reshape(-1, 1, 1, 1)


@dataclass(frozen=True, eq=False)
class Inversion:
    """Latents and noise maps of inverted images, float32.

    Attributes:
        latents: (images, steps - skip + 1, channels, height, width); [:, 0] are those before step `skip`, the
            last are the clean ones.
        noise_maps: (images, steps - skip, channels, height, width); [:, 0] are those of step `skip`.
        skip: steps that were left out.
    """

    latents: Tensor
    noise_maps: Tensor
    skip: int = 0

    def at(self, step: int) -> Tensor:
        """(images, channels, height, width): the latents before a step, counted from 0 in the whole run;
        after the last step, the clean ones."""
        return self.latents[:, step - self.skip]

    def noise_map(self, step: int) -> Tensor:
        """(images, channels, height, width): z of a step, counted from 0 in the whole run."""
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
    """The noise maps with which sampling goes through noised versions of `clean` (arXiv 2304.06140, section
    3).

    Every level is noised independently, so that all steps of an image can go through the model in batches; an
    image's result does not depend on the others'.

    Args:
        clean: (images, channels, height, width), latents as the model was trained on.
        predict: the model, guidance included; its outputs are taken as float32.
        schedule: levels of noise.
        generators: one for each image. The levels draw from it from the clean end on: `skip` changes none of
            them.
        skip: steps left out at the noisy end.
        keep_last: whether the last noise map is kept; else it is 0, as in the method, and the last step gives
            its mean.
        batch: steps in one call of the model.
        progress: called with the number of steps done in each call of the model.

    Raises:
        ValueError: a number of generators, a skip or a batch that does not fit; keep_last where the last step
            has no noise to carry it. FloatingPointError: a model whose output is not finite.
    """
    if clean.dim() != 4:
        raise ValueError(f"clean: expected shape (images, channels, height, width), got {tuple(clean.shape)}")
    if len(generators) != len(clean):
        raise ValueError(f"generators: expected one for each of {len(clean)} images, got {len(generators)}")
    check_skip(skip, schedule.steps)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
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
    """Sampling that re-adds the inversion's noise maps, from its first latents on.

    Returns:
        (images, steps - skip + 1, channels, height, width) float32, the latents of all levels: the
        inversion's, to float error, where `predict` is the one that it was made with; but for the last, where
        its noise map is 0.
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
    """A diffusers UNet as `predict`, with classifier-free guidance (arXiv 2207.12598) where it is not 1.

    Args:
        unet: a UNet2DConditionModel; latents are cast to its dtype.
        prompt: (1, tokens, channels), embeddings of the text. negative: the same, needed for guidance other
            than 1.
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
    """skip; None: the share of `steps` that released = (skip, steps) have.

    Raises:
        ValueError: no step is left.
    """
    if skip is None:
        return steps * released[0] // released[1]
    check_skip(skip, steps)
    return skip


def check_skip(skip: int, steps: int) -> None:
    """ValueError unless at least one step is left."""
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip < steps:
        raise ValueError(
            f"skip: expected an integer from 0 to {steps - 1}, as there are {steps} steps, got {skip!r}"
        )

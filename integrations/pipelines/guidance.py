"""Swap guidance: the base of the pipelines that swap self-attention between images in Stable Diffusion."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...bindings import adain
from ..diffusers import Method, apply
from .inversion.cache import InversionCache, WeightsDigest
from .inversion.ddpm import DDPMSchedule, Inversion, invert, noise_predictor
from .shared.arguments import check_count, check_number, check_texts
from .shared.stable_diffusion_parts import StableDiffusionParts

Scale = Callable[[int, int], float]  # (step, steps) -> scale of the swap guidance


@dataclass(frozen=True)
class InversionOptions:
    """How images are inverted.

    Attributes:
        steps: levels of noise of the whole run.
        skip: steps left out at the noisy end.
        text: prompt of the inversion, and of the sampling.
        negative_text: prompt that guidance of the inversion leads away from.
        guidance: scale of the inversion's classifier-free guidance; 1: none. Sampling has none.
        seed: of the noise, from 0 to 2**63 - 1.
        batch: levels of an image in one UNet call.
        use_cache: keep inverted images on disk, and read them from there.
    """

    steps: int
    skip: int
    text: str
    negative_text: str
    guidance: float
    seed: int
    batch: int = 8
    use_cache: bool = True

    def __post_init__(self) -> None:
        check_texts(text=self.text, negative_text=self.negative_text)
        check_number("inversion_guidance", self.guidance)
        check_count("inversion_batch", self.batch)

    @property
    def guided(self) -> bool:
        """Whether the negative text has an effect."""
        return self.guidance != 1 and self.text != self.negative_text


class SwapGuidancePipeline(StableDiffusionParts):
    """The base of VisualICLPipeline and AppearanceTransferPipeline: Stable Diffusion under swap guidance.

    The known images are inverted (inversion/ddpm.py). The output starts from the noisy latents of one of them
    and adds its noise maps; in the UNet's self-attention it reads other images, as a method decides. Every
    step is one UNet call on the known images and on the output twice, with the swap and without, from which
    follows

        eps = eps_plain + scale(step) (eps_swap - eps_plain)

    After the step the output's latents can take the mean and deviation of images, channel by channel (adain).

    Args:
        pipe: a diffusers StableDiffusionPipeline.
        cache: folder of inverted images, shared by any number of runs and models; None: default_folder().
        backend: as in flashbrush.attention.

    Raises:
        TypeError, ValueError: as in StableDiffusionParts.
    """

    _options = ("cache",)

    def __init__(
        self, pipe: Any, *, cache: str | os.PathLike[str] | None = None, backend: str = "auto"
    ) -> None:
        super().__init__(pipe, backend=backend)
        self.cache = InversionCache(cache)
        self._weights = WeightsDigest()

    def _schedule(self, steps: int) -> DDPMSchedule:
        from diffusers import DDIMScheduler

        own: Any = DDIMScheduler.from_config(self.pipe.scheduler.config)
        return DDPMSchedule.from_scheduler(own, steps)

    def _invert(
        self, photos: Sequence[Image.Image], schedule: DDPMSchedule, options: InversionOptions, progress: bool
    ) -> tuple[Inversion, int]:
        """Invert images, or read their inversions from the cache.

        Each image is inverted by itself, so its inversion is bitwise the same whatever images come with it.

        Args:
            photos: of the model's size.
            schedule: levels of noise.
            options: of the inversion.
            progress: whether to show a progress bar.

        Returns:
            (inversions of all images, how many were read from the cache).
        """
        pipe, count = self.pipe, schedule.steps - options.skip
        against = self._embed(options.negative_text) if options.guided else None
        guidance = options.guidance if options.guided else 1.0
        predict = noise_predictor(pipe.unet, self._embed(options.text), against, guidance)
        settings: dict[str, Any] = {
            "text": options.text,
            "negative": options.negative_text if options.guided else None,
            "guidance": guidance,
            "skip": options.skip,
            "batch": options.batch,
        }
        if options.use_cache:
            parts = (pipe.unet, pipe.vae, pipe.text_encoder)
            settings |= {
                "weights": self._weights(*parts),
                "dtypes": [str(part.dtype) for part in parts],
                "levels": [
                    schedule.timesteps.tolist(),
                    schedule.alphas.tolist(),
                    schedule.prediction,
                    schedule.eta,
                ],
                "backend": self.backend,
                "device": pipe._execution_device.type,
                "tiling": bool(getattr(pipe.vae, "use_tiling", False)),
            }
        found, reused = [], 0
        with (
            apply(pipe.unet, backend=self.backend),
            self._bar("inverting", len(photos) * count, progress) as bar,
        ):
            for photo in photos:
                pixels = hashlib.sha256(f"{photo.size}".encode() + photo.tobytes()).hexdigest()
                # The pixels are part of the seed: with the same noise, images would attend to each other at
                # equal positions.
                seed = int.from_bytes(hashlib.sha256(f"{options.seed}:{pixels}".encode()).digest()[:7], "big")
                key = settings | {"pixels": pixels, "seed": seed}
                entry = self.cache.get(key) if options.use_cache else None
                if entry is not None:
                    reused += 1
                    bar.update(count)
                else:
                    entry = invert(
                        self._encode(photo),
                        predict,
                        schedule,
                        generators=[torch.Generator().manual_seed(seed)],
                        skip=options.skip,
                        batch=options.batch,
                        progress=bar.update,
                    )
                    if options.use_cache:
                        self.cache.put(key, entry)
                found.append(entry)
        device = pipe._execution_device
        latents = torch.cat([entry.latents.to(device) for entry in found])
        return Inversion(
            latents, torch.cat([entry.noise_maps.to(device) for entry in found]), options.skip
        ), reused

    def _sample(
        self,
        known: Inversion,
        text: str,
        schedule: DDPMSchedule,
        method: Method,
        scales: Sequence[float],
        *,
        start: int,
        style: Sequence[int],
        first: int = 0,
        adain_from: int | None = 0,
        progress: bool = True,
    ) -> Tensor:
        """Sample the output. The batch of a UNet call is [known images, output without the swap, output].

        Args:
            known: inversions of the images.
            text: prompt.
            schedule: levels of noise.
            method: decides which items of the batch read which.
            scales: of the swap guidance, one for each step that is run; a step of scale 0 is plain.
            start: index of the known image whose noisy latents and noise maps the output has.
            style: indices of the known images whose statistics, taken together, the output takes.
            first: the method's count of the first step that is run.
            adain_from: index of the first step after which statistics are taken, of those run; None: never.
            progress: whether to show a progress bar.

        Returns:
            The output's clean latents, (1, channels, height, width) float32.
        """
        embedded = self._embed(text)
        predict = noise_predictor(self.pipe.unet, embedded)
        latents = known.at(known.skip)[[start]]
        with (
            apply(self.pipe.unet, method, backend=self.backend) as handle,
            self._bar("sampling", len(scales), progress) as bar,
        ):
            for count, scale in enumerate(scales):
                step = known.skip + count
                # Without the method: set_step plans for the batch of the last call, which may have another
                # size.
                handle.method = None
                handle.set_step(first + count, first + len(scales), float((1 - schedule.alphas[step]).sqrt()))
                handle.method = method if scale else None
                batch = torch.cat([known.at(step), latents, latents]) if scale else latents
                output = predict(batch, schedule.timesteps[step].to(latents.device).expand(len(batch)))
                if scale:
                    plain, swapped = output[-2:].split(1)
                    output = plain + scale * (swapped - plain)
                latents = schedule.step(latents, output, step, known.noise_map(step)[[start]])
                if adain_from is not None and count >= adain_from:
                    styles = known.at(step + 1)[list(style)]  # (images, channels, height, width)
                    latents = adain(latents, torch.cat(styles.split(1), 2))
                bar.update()
        return latents


def guidance_scales(
    gamma: float | Scale, default: Callable[[float, int, int], float], steps: range, total: int
) -> list[float]:
    """The scale of the swap guidance in each of `steps`.

    Args:
        gamma: a number, or a function (step, total) -> scale.
        default: the function (gamma, step, total) -> scale that turns a number into scales.
        steps: that are run.
        total: number of steps, passed to gamma's function.

    Raises:
        TypeError: gamma is neither.
        ValueError: a number or a scale that is not finite.
    """
    if callable(gamma):
        scales = [gamma(step, total) for step in steps]
    else:
        check_number("gamma", gamma, TypeError)
        scales = [default(gamma, step, total) for step in steps]
    for step, scale in zip(steps, scales, strict=True):
        check_number(f"gamma of step {step}", scale)
    return scales

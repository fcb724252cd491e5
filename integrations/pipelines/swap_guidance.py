"""Stable Diffusion with swapped self-attention: what the pipelines of the cross-image methods share."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ...bindings import adain
from ..diffusers import Method, apply
from . import images as im
from .ddpm_inversion import DDPMSchedule, Inversion, check_skip, invert, noise_predictor
from .inversion_cache import InversionCache, WeightsDigest

Scale = Callable[[int, int], float]  # (step, steps) -> scale of the swap guidance
Pipeline = TypeVar("Pipeline", bound="SwapGuidancePipeline")


@dataclass(frozen=True)
class InversionOptions:
    """How images are inverted.

    Attributes:
        steps: levels of noise of the whole run. skip: steps left out at the noisy end.
        text: what cross-attention reads, in the sampling too.
        negative_text, guidance: classifier-free guidance of the inversion alone, against another text.
        seed: of the noise, from 0 to 2**63 - 1.
        batch: levels of an image in one UNet call.
        use_cache: keep inverted images on disk, and take them from there.
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
        for name, text in (("text", self.text), ("negative_text", self.negative_text)):
            if not isinstance(text, str):
                raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
        check_number("inversion_guidance", self.guidance)
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"inversion_batch: expected an integer of at least 1, got {self.batch!r}")

    @property
    def guided(self) -> bool:
        """Whether the second text has a part in it."""
        return self.guidance != 1 and self.text != self.negative_text


class SwapGuidancePipeline:
    """A StableDiffusionPipeline's parts under swap guidance; the base of VisualICLPipeline and AppearanceTransferPipeline.

    Images are inverted (ddpm_inversion.py). An output starts from the noisy latents of one of them and re-adds its noise
    maps, while in the UNet's self-attention it reads others, as a method says. Every step is one UNet call for the known
    images and the output, twice: with the swap and without, of which follows

        eps = eps_plain + scale(step) (eps_swap - eps_plain)

    after which the output's latents take the mean and the deviation of images, channel by channel (adain). The wrapped
    pipeline is `pipe.pipe`; offload it, load LoRAs into it or enable FreeU as usual.

    Args:
        pipe: a diffusers StableDiffusionPipeline; its scheduler's levels are used with DDIM's timesteps.
        cache: folder of inverted images, shared by any number of runs and models; None: default_folder().
        backend: as in flashbrush.attention.

    Raises:
        TypeError: another pipeline. ValueError: a UNet that takes more than latents and text (inpainting, SDXL), or a
            scheduler without betas.
    """

    def __init__(self, pipe: Any, *, cache: str | os.PathLike[str] | None = None, backend: str = "auto") -> None:
        from diffusers import StableDiffusionPipeline

        if not isinstance(pipe, StableDiffusionPipeline):
            raise TypeError(f"pipe: expected a StableDiffusionPipeline, got {type(pipe).__name__}")
        self.pipe: Any = pipe  # diffusers' parts are typed as any of several classes
        config, channels = self.pipe.unet.config, self.pipe.vae.config.latent_channels
        if config.in_channels != channels:
            raise ValueError(
                f"model: expected a UNet that takes {channels} channels, the latents, got one that takes "
                f"{config.in_channels}, as for inpainting"
            )
        if config.addition_embed_type is not None or config.class_embed_type is not None:
            raise ValueError("model: expected a UNet that takes latents and text alone, got one with further inputs (SDXL)")
        if "beta_start" not in self.pipe.scheduler.config:
            raise ValueError(f"scheduler: expected one with betas, as DDIM has, got {type(pipe.scheduler).__name__}")
        self.cache, self.backend = InversionCache(cache), backend
        self._weights = WeightsDigest()

    @classmethod
    def from_pretrained(
        cls: type[Pipeline],
        model: str | os.PathLike[str],
        *,
        cache: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> Pipeline:
        """Load from a hub id or a diffusers folder; safetensors only.

        Args:
            model: Stable Diffusion 1.x or 2.x. cache, backend: as above.
            options: passed on to StableDiffusionPipeline.from_pretrained (dtype, device_map, revision ...). Without a
                dtype, bfloat16. The safety checker, which sees no output, is not loaded.

        Raises:
            OSError: not found. ValueError: a folder, or weights, of another kind of model.
        """
        from diffusers import StableDiffusionPipeline

        if os.path.isdir(model):
            _check_folder(model)
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.bfloat16)
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline.from_pretrained(model, use_safetensors=True, **(unused | options))
        return cls(pipe, cache=cache, backend=backend)

    def to(self: Pipeline, *args: Any, **options: Any) -> Pipeline:
        """As DiffusionPipeline.to."""
        self.pipe.to(*args, **options)
        return self

    def size(self, size: tuple[int, int], *, width: int | None = None, height: int | None = None) -> tuple[int, int]:
        """The (width, height) at which the model sees images of `size`, in pixels.

        Args:
            width, height: multiples of the autoencoder's 8; None: near `size`, with at most the pixels that the UNet was
                trained on.

        Raises:
            ValueError: a width or height that is not positive, or not a multiple.
        """
        multiple = self.pipe.vae_scale_factor
        trained = self.pipe.unet.config.sample_size or 64  # a UNet may not say; SD's have 64 latents each way
        cells = math.prod(trained) if isinstance(trained, (list, tuple)) else trained**2
        return im.panel_size(size, width=width, height=height, multiple=multiple, max_pixels=cells * multiple**2)

    def _schedule(self, steps: int, skip: int) -> DDPMSchedule:
        from diffusers import DDIMScheduler

        own: Any = DDIMScheduler.from_config(self.pipe.scheduler.config)
        schedule = DDPMSchedule.from_scheduler(own, steps)
        check_skip(skip, steps)
        return schedule

    def _embed(self, text: str) -> Tensor:
        """(1, tokens, channels)"""
        return self.pipe.encode_prompt(text, self.pipe._execution_device, 1, False)[0]

    def _encode(self, photo: Image.Image) -> Tensor:
        """(1, channels, height, width) float32: the mean of the autoencoder, scaled as the UNet knows it."""
        pipe, vae = self.pipe, self.pipe.vae
        pixels = pipe.image_processor.preprocess(photo).to(pipe._execution_device, vae.dtype)
        return vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor

    def _decode(self, latents: Tensor) -> Image.Image:
        if not bool(latents.isfinite().all()):
            raise FloatingPointError(f"the latents are no longer finite in {self.pipe.unet.dtype}: try bfloat16 or float32")
        vae = self.pipe.vae
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        self.pipe.maybe_free_model_hooks()
        return self.pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]

    def _bar(self, what: str, total: int, progress: bool) -> Any:
        from tqdm.auto import tqdm

        config: dict[str, Any] = {"desc": what, **getattr(self.pipe, "_progress_bar_config", {})}
        return tqdm(total=total, **(config if progress else {**config, "disable": True}))

    def _invert(
        self, photos: Sequence[Image.Image], schedule: DDPMSchedule, options: InversionOptions, progress: bool
    ) -> tuple[Inversion, int]:
        """The images' inversions, and how many of them were kept.

        Each is inverted by itself, so that a kept one is the same bits whatever it was inverted with.
        """
        pipe, count = self.pipe, schedule.steps - options.skip
        against = self._embed(options.negative_text) if options.guided else None
        guidance = options.guidance if options.guided else 1.0
        predict = noise_predictor(pipe.unet, self._embed(options.text), against, guidance)
        settings: dict[str, Any] = {
            "text": options.text, "negative": options.negative_text if options.guided else None, "guidance": guidance,
            "skip": options.skip, "batch": options.batch,
        }  # fmt: skip
        if options.use_cache:
            parts = (pipe.unet, pipe.vae, pipe.text_encoder)
            settings |= {
                "weights": self._weights(*parts), "dtypes": [str(part.dtype) for part in parts],
                "levels": [schedule.timesteps.tolist(), schedule.alphas.tolist(), schedule.prediction, schedule.eta],
                "backend": self.backend, "device": pipe._execution_device.type,
                "tiling": bool(getattr(pipe.vae, "use_tiling", False)),
            }  # fmt: skip
        found, reused = [], 0
        with (
            apply(pipe.unet, backend=self.backend),
            self._bar("inverting", len(photos) * count, progress) as bar,
        ):
            for photo in photos:
                pixels = hashlib.sha256(f"{photo.size}".encode() + photo.tobytes()).hexdigest()
                # Of the pixels too: images with the same noise would match each other place by place.
                seed = int.from_bytes(hashlib.sha256(f"{options.seed}:{pixels}".encode()).digest()[:7], "big")
                key = settings | {"pixels": pixels, "seed": seed}
                entry = self.cache.get(key) if options.use_cache else None
                if entry is not None:
                    reused += 1
                    bar.update(count)
                else:
                    entry = invert(
                        self._encode(photo), predict, schedule, generators=[torch.Generator().manual_seed(seed)],
                        skip=options.skip, batch=options.batch, progress=bar.update,
                    )  # fmt: skip
                    if options.use_cache:
                        self.cache.put(key, entry)
                found.append(entry)
        device = pipe._execution_device
        latents = torch.cat([entry.latents.to(device) for entry in found])
        return Inversion(latents, torch.cat([entry.noise_maps.to(device) for entry in found]), options.skip), reused

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
        """The output's clean latents, (1, channels, height, width) float32.

        A UNet call has the known images, the output without the swap, and the output.

        Args:
            known: the images that are read, and those that give noise and style.
            method: which items of that batch read which. scales: of the swap guidance, in each step that is run.
            start: of the known images, the one whose noisy latents and noise maps the output has.
            style: of the known images, those whose statistics, of all of them together, the output takes.
            first: what the method counts the first step as. adain_from: of the steps that are run; None: never.
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
                handle.method = None  # set_step would ask it about the call before, whose batch may be another
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


def guidance_scales(gamma: float | Scale, default: Callable[[float, int, int], float], steps: range, total: int) -> list[float]:
    """The scale of the swap guidance in each of `steps`.

    Args:
        gamma: a number, which `default` (gamma, step, total) makes scales of, or a callable (step, total) -> scale.

    Raises:
        TypeError: neither. ValueError: a number, or a scale, that is not finite.
    """
    if callable(gamma):
        scales = [gamma(step, total) for step in steps]
    else:
        check_number("gamma", gamma, TypeError)
        scales = [default(gamma, step, total) for step in steps]
    for step, scale in zip(steps, scales, strict=True):
        check_number(f"gamma of step {step}", scale)
    return scales


def check_number(name: str, value: Any, error: type[Exception] = ValueError) -> None:
    """ValueError unless it is a finite number; `error` where it is no number at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise error(f"{name}: expected a finite number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def noise_seed(seed: int | None, generator: torch.Generator | None) -> tuple[int, int | None]:
    """(what the noise is drawn from, the seed to report, None where a generator was given).

    Raises:
        ValueError: both, or a seed that is none. TypeError: a generator that is none.
    """
    if generator is not None:
        if seed is not None:
            raise ValueError("seed: expected it or generator, got both")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device)), None
    if seed is None:  # so that torch.manual_seed decides
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed!r}")
    return seed, seed


def _check_folder(folder: str | os.PathLike[str]) -> None:
    """ValueError unless the folder holds the parts of a StableDiffusionPipeline that are used here."""
    where = os.fspath(folder)
    if os.path.exists(os.path.join(folder, "transformer")) and not os.path.exists(os.path.join(folder, "unet")):
        raise ValueError(f"model: {where} is no UNet model such as Stable Diffusion 1.5: it has a transformer in its place")
    parts = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
    if missing := [part for part in parts if not os.path.exists(os.path.join(folder, part))]:
        raise ValueError(f"model: {where} is not a Stable Diffusion checkpoint: it has no {', '.join(missing)}")

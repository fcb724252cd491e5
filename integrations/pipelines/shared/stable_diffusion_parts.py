"""The base of the pipelines on Stable Diffusion: loading, sizes, and photos to latents and back."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .. import images as im
from .arguments import check_finite
from .progress import progress_bar

Pipeline = TypeVar("Pipeline", bound="StableDiffusionParts")


class StableDiffusionParts:
    """The base of the pipelines on Stable Diffusion 1.x and 2.x.

    The wrapped StableDiffusionPipeline is `pipe`; offload it, load LoRAs into it or enable FreeU as usual.

    Args:
        pipe: a diffusers StableDiffusionPipeline; its scheduler's levels are used with DDIM's timesteps.
        backend: as in flashbrush.attention.

    Raises:
        TypeError: another pipeline.
        ValueError: a UNet that takes more than latents and text (inpainting, SDXL), or a scheduler without
            betas.
    """

    _options: tuple[str, ...] = ()  # arguments of __init__ other than pipe and backend

    def __init__(self, pipe: Any, *, backend: str = "auto") -> None:
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
            raise ValueError(
                "model: expected a UNet that takes latents and text alone, got one with further inputs (SDXL)"
            )
        if "beta_start" not in self.pipe.scheduler.config:
            raise ValueError(
                f"scheduler: expected one with betas, as DDIM has, got {type(pipe.scheduler).__name__}"
            )
        self.backend = backend

    @classmethod
    def from_pretrained(
        cls: type[Pipeline],
        model: str | os.PathLike[str],
        *,
        backend: str = "auto",
        **options: Any,
    ) -> Pipeline:
        """Load from a hub id or a diffusers folder; safetensors only.

        Args:
            model: Stable Diffusion 1.x or 2.x.
            backend: as in flashbrush.attention.
            options: this class's own (`cache`, where it has one); the others are passed on to
                StableDiffusionPipeline.from_pretrained (dtype, device_map, revision ...). The default dtype
                is bfloat16. The safety checker is not loaded: these pipelines do not call it.

        Raises:
            OSError: not found.
            ValueError: a folder, or weights, of another kind of model.
        """
        from diffusers import StableDiffusionPipeline

        if os.path.isdir(model):
            _check_folder(model)
        own = {name: options.pop(name) for name in cls._options if name in options}
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.bfloat16)
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline.from_pretrained(model, use_safetensors=True, **(unused | options))
        return cls(pipe, backend=backend, **own)

    def to(self: Pipeline, *args: Any, **options: Any) -> Pipeline:
        """Move the model, as DiffusionPipeline.to; returns self."""
        self.pipe.to(*args, **options)
        return self

    def size(
        self, size: tuple[int, int], *, width: int | None = None, height: int | None = None
    ) -> tuple[int, int]:
        """The (width, height) at which the model sees images of `size`, in pixels.

        Args:
            size: of the images.
            width: a multiple of the autoencoder's 8; None: from the height, or near the images' own.
            height: the same. With neither, at most as many pixels as the UNet was trained on.

        Raises:
            ValueError: a width or height that is not positive, or not a multiple.
        """
        multiple = self.pipe.vae_scale_factor
        trained = (
            self.pipe.unet.config.sample_size or 64
        )  # where it is not set: Stable Diffusion's 64 latents
        cells = math.prod(trained) if isinstance(trained, (list, tuple)) else trained**2
        return im.panel_size(
            size, width=width, height=height, multiple=multiple, max_pixels=cells * multiple**2
        )

    def _embed(self, text: str) -> Tensor:
        """Embeddings of a text, (1, tokens, channels); warns where the encoder cuts the text off."""
        tokenizer = self.pipe.tokenizer
        if (count := len(tokenizer(text).input_ids)) > tokenizer.model_max_length:
            seen = tokenizer.model_max_length
            warnings.warn(
                f"flashbrush: the text encoder reads {seen} of {count} tokens: {text[:60]!r}", stacklevel=3
            )
        return self.pipe.encode_prompt(text, self.pipe._execution_device, 1, False)[0]

    def _encode(self, photo: Image.Image) -> Tensor:
        """Scaled latents of a photo, the encoder's mean: (1, channels, height, width) float32."""
        pipe, vae = self.pipe, self.pipe.vae
        pixels = pipe.image_processor.preprocess(photo).to(pipe._execution_device, vae.dtype)
        return vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor

    def _decode(self, latents: Tensor) -> Image.Image:
        """The picture of latents (1, channels, height, width).

        Raises:
            FloatingPointError: the latents are not finite.
        """
        check_finite(latents, self.pipe.unet.dtype)
        vae = self.pipe.vae
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        self.pipe.maybe_free_model_hooks()
        return self.pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]

    def _bar(self, what: str, total: int, progress: bool) -> Any:
        return progress_bar(self.pipe, what, total, progress)


def _check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError unless the folder has the parts of a StableDiffusionPipeline that are used here."""
    where = os.fspath(folder)
    if os.path.exists(os.path.join(folder, "transformer")) and not os.path.exists(
        os.path.join(folder, "unet")
    ):
        raise ValueError(
            f"model: {where} is no UNet model such as Stable Diffusion 1.5: it has a transformer in its place"
        )
    parts = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
    if missing := [part for part in parts if not os.path.exists(os.path.join(folder, part))]:
        raise ValueError(
            f"model: {where} is not a Stable Diffusion checkpoint: it has no {', '.join(missing)}"
        )

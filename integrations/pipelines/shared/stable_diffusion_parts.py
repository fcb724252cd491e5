"""The parts of a StableDiffusionPipeline, as the editing pipelines use them."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .. import images as im

Pipeline = TypeVar("Pipeline", bound="StableDiffusionParts")


class StableDiffusionParts:
    """Loading, sizes, and photos to latents and back; the base of the pipelines on Stable Diffusion 1.x and
    2.x.

    The wrapped pipeline is `pipe.pipe`; offload it, load LoRAs into it or enable FreeU as usual.

    Args:
        pipe: a diffusers StableDiffusionPipeline; its scheduler's levels are used with DDIM's timesteps.
        backend: as in flashbrush.attention.

    Raises:
        TypeError: another pipeline. ValueError: a UNet that takes more than latents and text (inpainting,
            SDXL), or a scheduler without betas.
    """

    _options: tuple[str, ...] = ()  # of __init__, beside `backend`

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
            model: Stable Diffusion 1.x or 2.x. backend: as above.
            options: this class's own (of some, `cache`), and those passed on to
                StableDiffusionPipeline.from_pretrained (dtype, device_map, revision ...). Without a dtype,
                bfloat16. The safety checker, which sees no output, is not loaded.

        Raises:
            OSError: not found. ValueError: a folder, or weights, of another kind of model.
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
        """As DiffusionPipeline.to."""
        self.pipe.to(*args, **options)
        return self

    def size(
        self, size: tuple[int, int], *, width: int | None = None, height: int | None = None
    ) -> tuple[int, int]:
        """The (width, height) at which the model sees images of `size`, in pixels.

        Args:
            width, height: multiples of the autoencoder's 8; None: near `size`, with at most the pixels that
                the UNet was trained on.

        Raises:
            ValueError: a width or height that is not positive, or not a multiple.
        """
        multiple = self.pipe.vae_scale_factor
        trained = self.pipe.unet.config.sample_size or 64  # a UNet may not say; SD's have 64 latents each way
        cells = math.prod(trained) if isinstance(trained, (list, tuple)) else trained**2
        return im.panel_size(
            size, width=width, height=height, multiple=multiple, max_pixels=cells * multiple**2
        )

    def _embed(self, text: str) -> Tensor:
        """(1, tokens, channels); a warning tells of a text that the encoder sees only the beginning of."""
        tokenizer = self.pipe.tokenizer
        if (count := len(tokenizer(text).input_ids)) > tokenizer.model_max_length:
            warnings.warn(
                f"flashbrush: of {count} tokens the text encoder sees {tokenizer.model_max_length}: {text[:60]!r}",
                stacklevel=3,
            )
        return self.pipe.encode_prompt(text, self.pipe._execution_device, 1, False)[0]

    def _encode(self, photo: Image.Image) -> Tensor:
        """(1, channels, height, width) float32: the mean of the autoencoder, scaled as the UNet knows it."""
        pipe, vae = self.pipe, self.pipe.vae
        pixels = pipe.image_processor.preprocess(photo).to(pipe._execution_device, vae.dtype)
        return vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor

    def _decode(self, latents: Tensor) -> Image.Image:
        if not bool(latents.isfinite().all()):
            raise FloatingPointError(
                f"the latents are no longer finite in {self.pipe.unet.dtype}: try bfloat16 or float32"
            )
        vae = self.pipe.vae
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        self.pipe.maybe_free_model_hooks()
        return self.pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]

    def _bar(self, what: str, total: int, progress: bool) -> Any:
        from tqdm.auto import tqdm

        config: dict[str, Any] = {"desc": what, **getattr(self.pipe, "_progress_bar_config", {})}
        return tqdm(total=total, **(config if progress else {**config, "disable": True}))


def _check_folder(folder: str | os.PathLike[str]) -> None:
    """ValueError unless the folder holds the parts of a StableDiffusionPipeline that are used here."""
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

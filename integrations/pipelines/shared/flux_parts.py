"""The base of the pipelines on FLUX.1: loading, noise levels, and photos to latents and back."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .. import images as im
from .arguments import check_finite
from .progress import progress_bar

Pipeline = TypeVar("Pipeline", bound="FluxParts")


class FluxParts:
    """The base of the pipelines on FLUX.1.

    The wrapped FluxPipeline is `pipe`; offload it or load LoRAs into it as usual.

    Args:
        pipe: a diffusers FluxPipeline.
        backend: as in flashbrush.attention.

    Raises:
        TypeError: another pipeline.
    """

    def __init__(self, pipe: Any, *, backend: str = "auto") -> None:
        from diffusers import FluxPipeline

        if not isinstance(pipe, FluxPipeline):
            raise TypeError(f"pipe: expected a FluxPipeline, got {type(pipe).__name__}")
        self.pipe: Any = pipe
        self.backend = backend

    @classmethod
    def from_pretrained(
        cls: type[Pipeline], model: str | os.PathLike[str], *, backend: str = "auto", **options: Any
    ) -> Pipeline:
        """Load from a hub id or a diffusers folder; safetensors only.

        Args:
            model: FLUX.1-dev, or another checkpoint of FluxPipeline.
            backend: as in flashbrush.attention.
            options: passed on to FluxPipeline.from_pretrained (dtype, device_map, revision ...). The default
                dtype is bfloat16.

        Raises:
            OSError: not found.
            ValueError: a folder, or weights, of another kind of model.
        """
        from diffusers import FluxPipeline

        folder = os.fspath(model)
        if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, "transformer")):
            raise ValueError(f"model: {folder} is not a FLUX checkpoint: it has no transformer")
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.bfloat16)
        return cls(FluxPipeline.from_pretrained(model, use_safetensors=True, **options), backend=backend)

    def to(self: Pipeline, *args: Any, **options: Any) -> Pipeline:
        """Move the model, as DiffusionPipeline.to; returns self."""
        self.pipe.to(*args, **options)
        return self

    def _velocity(self, latents: Tensor, ids: Tensor, time: float, text: tuple, guidance: float) -> Tensor:
        """The transformer's output, (items, tokens, channels) float32.

        Args:
            latents: packed, (items, tokens, channels).
            ids: of their tokens, (tokens, 3).
            time: noise level, in [0, 1].
            text: embeddings (items, tokens, channels), pooled embeddings and ids, as _embed returns them.
            guidance: scale of the embedded guidance.
        """
        transformer, (embedded, pooled, text_ids) = self.pipe.transformer, text
        one = torch.ones(len(latents), device=latents.device)
        return transformer(
            hidden_states=latents.to(transformer.dtype),
            encoder_hidden_states=embedded,
            pooled_projections=pooled,
            timestep=(time * one).to(transformer.dtype),
            guidance=guidance * one if transformer.config.guidance_embeds else None,
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0].float()

    def _times(self, steps: int, tokens: int) -> list[float]:
        """FluxPipeline's noise levels for this number of image tokens: steps + 1 of them, falling to 0."""
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        config = scheduler.config
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(config[name] for name in names))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return [float(sigma) for sigma in scheduler.sigmas]

    def _embed(self, text: str, max_sequence_length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, pooled embeddings and ids of a text, cut to the tokenizer's length."""
        length = min(max_sequence_length, self.pipe.tokenizer_2.model_max_length)
        return self.pipe.encode_prompt(
            text, None, device=self.pipe._execution_device, max_sequence_length=length
        )

    def _encode(self, photo: Image.Image) -> tuple[Tensor, Tensor]:
        """Packed latents of a photo, (1, tokens, channels) float32, and their ids, (tokens, 3)."""
        pipe, vae = self.pipe, self.pipe.vae
        pixels = pipe.image_processor.preprocess(photo).to(pipe._execution_device, vae.dtype)
        latents = (
            vae.encode(pixels).latent_dist.mode().float() - vae.config.shift_factor
        ) * vae.config.scaling_factor
        rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
        ids = pipe._prepare_latent_image_ids(1, rows, columns, latents.device, pipe.transformer.dtype)
        return pipe._pack_latents(latents, *latents.shape), ids

    def _decode(self, latents: Tensor, size: tuple[int, int]) -> Image.Image:
        """The picture, of `size` in pixels, of packed latents.

        Raises:
            FloatingPointError: the latents are not finite.
        """
        check_finite(latents, self.pipe.transformer.dtype)
        pipe, vae = self.pipe, self.pipe.vae
        unpacked = pipe._unpack_latents(latents, size[1], size[0], pipe.vae_scale_factor)
        pixels = vae.decode(
            (unpacked / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype), return_dict=False
        )[0]
        pipe.maybe_free_model_hooks()
        return pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]

    def _cells(self, mask: Image.Image) -> Tensor:
        """Latents in which any pixel of the mask is on, bool (rows, columns)."""
        return torch.from_numpy(im.mask_cells(mask, self.pipe.vae_scale_factor))

    def _bar(self, what: str, total: int, progress: bool) -> Any:
        return progress_bar(self.pipe, what, total, progress)

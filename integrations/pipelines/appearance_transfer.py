"""Appearance transfer by cross-image attention: the structure of one photo with the appearance of another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ..methods import CrossImageAttention, TransferRoles
from ..methods.shared.layers_and_steps import scaled
from . import images as im
from .guidance import InversionOptions, Scale, SwapGuidancePipeline, guidance_scales
from .images import ImageLike
from .inversion.ddpm import steps_left_out
from .shared.arguments import noise_seed

STEPS = 100  # levels of noise in the released code
APPEARANCE, STRUCTURE, OUTPUT = 0, 1, 3  # items of a UNet call; 2 is the output without the swap


def linear_fall(gamma: float, step: int, steps: int) -> float:
    """From gamma in the first step to max(gamma / 2, 1) in the last, as in the code of arXiv 2311.03335."""
    last = max(gamma / 2, 1.0)
    return gamma + (last - gamma) * step / max(steps - 1, 1)


@dataclass
class AppearanceTransferOutput:
    """Result of AppearanceTransferPipeline.

    Attributes:
        image: the result, RGB, of the structure's own size.
        latents: of the result, (1, channels, height, width) float32.
        size: (width, height) in pixels at which the model saw the photos.
        seed: that reproduces the result; None where a generator was given.
        reused: number of inversions that were read from the cache, of two.
    """

    image: Image.Image
    latents: Tensor
    size: tuple[int, int]
    seed: int | None
    reused: int


class AppearanceTransferPipeline(SwapGuidancePipeline):
    """Cross-image attention (arXiv 2311.03335) on Stable Diffusion, without training.

    Both photos are inverted. The output starts from the structure's noisy latents and adds its noise maps. In
    the UNet's upsampling self-attention, its queries read the appearance's keys and values; in the later
    steps it takes the appearance's statistics.

    Defaults are the released code's. That code differs in three ways: it samples both photos beside the
    output, where here their inverted latents are used in every step; it can restrict the statistics to masks
    found by clustering; and it enables FreeU, for which call `pipe.pipe.enable_freeu`.

    Examples:
        ```python
        pipe = AppearanceTransferPipeline.from_pretrained(
            "stable-diffusion-v1-5/stable-diffusion-v1-5"
        ).to("cuda")
        pipe("zebra.png", "giraffe.png", text="A photo of an animal").image.save("out.png")
        ```

    Args:
        pipe: a diffusers StableDiffusionPipeline.
        cache: folder of inverted images; None: in the user's cache folder.
        backend: as in flashbrush.attention.

    Raises:
        TypeError: another pipeline.
        ValueError: a UNet that takes more than latents and text, or a scheduler without betas.
    """

    @torch.no_grad()
    def __call__(
        self,
        appearance: ImageLike,
        structure: ImageLike,
        *,
        text: str = "",
        method: CrossImageAttention | None = None,
        steps: int = STEPS,
        skip: int | None = None,
        gamma: float | Scale = 3.5,
        adain_from: int | Literal["auto"] | None = "auto",
        negative_text: str = "",
        inversion_guidance: float = 3.5,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        inversion_batch: int = 8,
        progress: bool = True,
    ) -> AppearanceTransferOutput:
        """Give `structure` the look of `appearance`.

        Args:
            appearance: a file, a PIL image, or a uint8 array; resized to the structure's size.
            structure: a file, a PIL image, or a uint8 array.
            text: prompt; the released code's is "A photo of a <what both show>".
            method: the knobs of the attention; the pipeline sets its items. None: the released code's: its
                windows of steps for layers of 64 and 32 tokens a side are used for layers as fine as the
                latents and half as fine, in proportion to `steps`. Steps are counted from the first that is
                run.
            steps: levels of noise of the whole run.
            skip: steps left out at the noisy end; None: 32 in 100.
            gamma: of the swap guidance: a number, from which linear_fall makes scales; or a function (step,
                steps) -> scale, with steps counted as the method's. A step of scale 0 is plain.
            adain_from: first step after which the output takes the appearance's statistics, counted as the
                method's; "auto": the 20th in 100 levels; None: never.
            negative_text: prompt that guidance of the inversion leads away from.
            inversion_guidance: scale of the inversion's classifier-free guidance.
            width: at which the model sees the photos, a multiple of 8; None: near the structure's own.
            height: the same.
            seed: of the inversions' noise; None: drawn from torch's default generator.
            generator: in place of a seed.
            use_cache: keep inverted images on disk, and read them from there.
            inversion_batch: levels of an image in one UNet call of the inversion.
            progress: show progress bars.

        Returns:
            The picture, and what reproduces it.

        Raises:
            TypeError, ValueError, FileNotFoundError: wrong input; the message names the argument.
            FloatingPointError: the latents are no longer finite.
        """
        schedule = self._schedule(steps)
        skip = steps_left_out(skip, steps, (32, STEPS))
        scales = guidance_scales(gamma, linear_fall, range(steps - skip), steps - skip)
        if adain_from == "auto":
            adain_from = round(20 * steps / STEPS)
        if adain_from is not None and (
            isinstance(adain_from, bool) or not isinstance(adain_from, int) or adain_from < 0
        ):
            raise ValueError(f"adain_from: expected a step of 0 or more, 'auto' or None, got {adain_from!r}")
        base, reported = noise_seed(seed, generator)
        options = InversionOptions(
            steps, skip, text, negative_text, inversion_guidance, base, inversion_batch, use_cache
        )
        if method is not None and not isinstance(method, CrossImageAttention):
            raise TypeError(f"method: expected a CrossImageAttention, got {type(method).__name__}")
        look = im.flatten(im.open_image(appearance, "appearance"))
        shape = im.flatten(im.open_image(structure, "structure"))
        size = self.size(shape.size, width=width, height=height)
        # The released code's windows name layers by their size at 512 x 512 pixels, 64 and 32 tokens a side.
        # Other sizes have other layers.
        columns, rows = (side // self.pipe.vae_scale_factor for side in size)
        own, share = CrossImageAttention(), steps / STEPS
        fine, coarse = (scaled(own.windows[side], share) for side in (64, 32))
        own.windows = {(rows, columns): fine, ((rows + 1) // 2, (columns + 1) // 2): coarse}
        own.structure_until = round(share * own.structure_until)
        method = replace(method or own, items=(TransferRoles(OUTPUT, APPEARANCE, STRUCTURE),))

        known, reused = self._invert(
            [im.resize_photo(photo, size) for photo in (look, shape)], schedule, options, progress
        )
        latents = self._sample(
            known,
            text,
            schedule,
            method,
            scales,
            start=STRUCTURE,
            style=[APPEARANCE],
            adain_from=adain_from,
            progress=progress,
        )
        image = im.resize_photo(self._decode(latents), shape.size)
        return AppearanceTransferOutput(image, latents, size, reported, reused)

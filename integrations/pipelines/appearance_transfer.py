"""Cross-image attention: a picture with the structure of one photo and the appearance of another, without
training.
"""

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
    """From gamma in the first step to max(gamma / 2, 1) in the last, linearly, as in the released code of
    arXiv 2311.03335."""
    last = max(gamma / 2, 1.0)
    return gamma + (last - gamma) * step / max(steps - 1, 1)


@dataclass
class AppearanceTransferOutput:
    """What one call made.

    Attributes:
        image: the result, RGB, of the structure's own size.
        latents: (1, channels, height, width) float32, the result's.
        size: (width, height) in pixels at which the model saw the photos.
        seed: the one that makes the same picture again; None where a generator was given.
        reused: how many of the two photos' inversions were on disk already.
    """

    image: Image.Image
    latents: Tensor
    size: tuple[int, int]
    seed: int | None
    reused: int


class AppearanceTransferPipeline(SwapGuidancePipeline):
    """Cross-image attention (arXiv 2311.03335) with the parts of a StableDiffusionPipeline; arguments as in
    SwapGuidancePipeline.

        pipe =
        AppearanceTransferPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
        pipe("zebra.png", "giraffe.png", text="A photo of an animal").image.save("out.png")

    Both photos are inverted. The output starts from the structure's noisy latents and re-adds its noise maps,
    while in the UNet's upsampling self-attention its own queries read the appearance's keys and values; it
    takes the appearance's statistics in the later steps. Defaults are the released code's, which differs in
    this: it samples both photos beside the output, where here their inverted levels stand for them; it can
    confine the statistics to masks that it finds by clustering; and it has FreeU, which
    `pipe.pipe.enable_freeu` turns on.
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
        """Paint `structure` with the look of `appearance`.

        Args:
            appearance, structure: files, PIL images, or uint8 arrays; the appearance is resized to the
                structure's size.
            text: what cross-attention reads; the released code's is "A photo of a <what both show>".
            method: the knobs of the attention; None: the released code's, whose windows for 64 and 32 tokens
                a side are those of layers as fine and half as fine as the latents, the same shares of any
                number of steps. The pipeline sets its items. Steps are counted from the first that is run, as
                in the released code.
            steps: levels of noise of the whole run. skip: steps left out at the noisy end; None: 32 in 100.
            gamma: of the swap guidance, which linear_fall makes scales of; or a callable (step, steps) ->
                scale, steps counted as the method's. A step of scale 0 is plain.
            adain_from: the first step after which the output takes the appearance's statistics, counted as
                the method's; "auto": the 20th in 100 levels; None: never.
            negative_text, inversion_guidance: classifier-free guidance of the inversion alone, against
                another text.
            width, height, seed, generator, use_cache, inversion_batch, progress: as in VisualICLPipeline.

        Raises:
            TypeError, ValueError, FileNotFoundError: naming the argument, what was expected and what came.
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
        # The released code's windows name the layers of 512 x 512 pixels: photos of other sizes have none of
        # 64 x 64.
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

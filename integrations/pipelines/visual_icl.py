"""Visual in-context learning by Stable Diffusion: predict for an image what pairs of images show."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..methods import InContextRoles, VisualInContext
from . import images as im
from .guidance import InversionOptions, Scale, SwapGuidancePipeline, guidance_scales
from .images import ImageLike
from .inversion.ddpm import steps_left_out
from .shared.arguments import noise_seed
from .shared.visual_icl_tasks import Palette, check_palette, check_task, palette_of, read_task

NEEDS_PALETTE = ("semantic", "keypoints")


def linear_decay(gamma: float, step: int, steps: int) -> float:
    """gamma (T - t)/T with t the step's index (arXiv 2508.09949): from gamma towards 0.

    The paper does not say whether t is the step's index or the timestep, with which the scale would grow. The
    code of the method that it builds on, cross-image attention, decays.
    """
    return gamma * (steps - step) / steps


@dataclass
class VisualICLOutput:
    """Result of VisualICLPipeline.

    Attributes:
        image: the prediction as the model painted it, RGB, of the query's own size.
        data: what the task reads from it, see visual_icl_tasks.TaskResult; None without a task.
        picture: the data drawn, of the query's own size; without a task, the image.
        latents: of the prediction, (1, channels, height, width) float32.
        size: (width, height) in pixels at which the model saw the images.
        task: the task's name, or None.
        palette: colours of the data for semantic and keypoints, (colours, 3) uint8; else None.
        seed: that reproduces the prediction; None where a generator was given.
        reused: number of inversions that were read from the cache.
    """

    image: Image.Image
    data: Any
    picture: Image.Image
    latents: Tensor
    size: tuple[int, int]
    task: str | None
    palette: Any
    seed: int | None
    reused: int


class VisualICLPipeline(SwapGuidancePipeline):
    """SD-VICL (arXiv 2508.09949) on Stable Diffusion, without training.

    The images A and B of each pair and the query C are inverted. The prediction D starts from C's noisy
    latents and adds C's noise maps. In the UNet's upsampling self-attention it takes queries from C, keys
    from A and values from B. The scale of the swap guidance is gamma (T - t)/T, and D takes the statistics of
    the B's after every step.

    Examples:
        ```python
        pipe = VisualICLPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
        result = pipe([("cat.png", "cat_mask.png")], "dog.png", task="segmentation")
        result.picture.save("dog_mask.png")
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
        prompts: Sequence[tuple[ImageLike, ImageLike]],
        query: ImageLike,
        *,
        task: str | None = None,
        method: VisualInContext | None = None,
        steps: int = 70,
        skip: int | None = None,
        gamma: float | Scale = 3.5,
        use_adain: bool = True,
        text: str = "",
        negative_text: str = "",
        inversion_guidance: float = 1.0,
        width: int | None = None,
        height: int | None = None,
        palette: Palette | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        inversion_batch: int = 8,
        progress: bool = True,
    ) -> VisualICLOutput:
        """Predict for `query` what the pairs show.

        Args:
            prompts: pairs (A, B) of an image and its ground truth, at least one: files, PIL images, or uint8
                arrays.
            query: the image C. All images must have its size unless width or height is given.
            task: one of visual_icl_tasks.TASKS: what to read from the prediction; None: the picture alone.
            method: the knobs of the attention; None: VisualInContext(), the paper's. The pipeline sets its
                items. Steps count from 0, skipped ones included.
            steps: levels of noise of the whole run (paper: 70).
            skip: steps left out at the noisy end, which would reproduce C; None: a seventh. The paper does
                not say; 10 of 70 are the warm-up of its reproduction.
            gamma: of the swap guidance (paper: 3.5): a number, from which linear_decay makes scales; or a
                function (step, steps) -> scale, with steps counted as the method's. A step of scale 0 is
                plain and leaves the other images out.
            use_adain: whether D takes the statistics of the B's, of all pairs together, after every step.
            text: prompt. The paper does not say; its reproduction's is empty.
            negative_text: prompt that guidance of the inversion leads away from.
            inversion_guidance: scale of the inversion's classifier-free guidance; 1: none.
            width: at which the model sees the images, a multiple of 8; None: near the query's own.
            height: the same. With neither, at most as many pixels as the UNet was trained on.
            palette: colours of the classes or keypoints; None: those of the ground truths.
            seed: of the inversions' noise; None: drawn from torch's default generator.
            generator: in place of a seed.
            use_cache: keep inverted images on disk, and read them from there.
            inversion_batch: levels of an image in one UNet call of the inversion.
            progress: show progress bars.

        Returns:
            The prediction, and what the task reads from it.

        Raises:
            TypeError, ValueError, FileNotFoundError: wrong input; the message names the argument.
            FloatingPointError: the latents are no longer finite.
        """
        schedule = self._schedule(steps)
        skip = steps_left_out(skip, steps, (10, 70))
        if task is not None:
            check_task(task)
        scales = guidance_scales(gamma, linear_decay, range(skip, steps), steps)
        base, reported = noise_seed(seed, generator)
        options = InversionOptions(
            steps, skip, text, negative_text, inversion_guidance, base, inversion_batch, use_cache
        )
        method = VisualInContext() if method is None else method
        if not isinstance(method, VisualInContext):
            raise TypeError(f"method: expected a VisualInContext, got {type(method).__name__}")
        if method.items is not None:
            raise ValueError("method: expected items=None, as the pipeline sets them")
        pairs, photo = open_prompts(prompts, query, resized=width is not None or height is not None)
        method = replace(method, items=InContextRoles.stacked(len(pairs)))
        size = self.size(photo.size, width=width, height=height)
        colours = None
        if task in NEEDS_PALETTE:
            colours = check_palette(palette_of([truth for _, truth in pairs]) if palette is None else palette)

        inputs = [im.resize_photo(image, size) for pair in pairs for image in pair] + [
            im.resize_photo(photo, size)
        ]
        known, reused = self._invert(inputs, schedule, options, progress)
        latents = self._sample(
            known,
            text,
            schedule,
            method,
            scales,
            start=len(inputs) - 1,
            style=range(1, len(inputs), 2),
            first=skip,
            adain_from=0 if use_adain else None,
            progress=progress,
        )
        image = im.resize_photo(self._decode(latents), photo.size)
        data, picture = None, image
        if task is not None:
            read = read_task(task, image, query=photo if task == "colourisation" else None, palette=colours)
            data, picture = read.data, read.picture
        return VisualICLOutput(image, data, picture, latents, size, task, colours, reported, reused)


def open_prompts(
    prompts: Sequence[tuple[ImageLike, ImageLike]], query: ImageLike, *, resized: bool = False
) -> tuple[list[tuple[Image.Image, Image.Image]], Image.Image]:
    """Open the images and ground truths of the pairs and the query, as RGB.

    Args:
        prompts: as in VisualICLPipeline.
        query: as in VisualICLPipeline.
        resized: whether all will be resized to one size, so that their sizes may differ.

    Returns:
        (pairs, query).

    Raises:
        TypeError: not a sequence of pairs.
        ValueError: no pair, an incomplete one, or images that differ in size; as open_image.
        FileNotFoundError: as open_image.
    """
    if isinstance(prompts, (str, os.PathLike)) or not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts: expected a sequence of pairs (image, ground truth), got {type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("prompts: expected at least one pair (image, ground truth), got none")
    photo = im.flatten(im.open_image(query, "query"))
    pairs = []
    for i, pair in enumerate(prompts):
        if isinstance(pair, (str, os.PathLike)) or not isinstance(pair, Sequence):
            raise TypeError(f"prompts[{i}]: expected a pair (image, ground truth), got {type(pair).__name__}")
        if len(pair) != 2 or any(entry is None for entry in pair):
            count = sum(entry is not None for entry in pair)
            raise ValueError(f"prompts[{i}]: expected a pair (image, ground truth), got {count} of them")
        image = im.flatten(im.open_image(pair[0], f"prompts[{i}]: image"))
        truth = im.flatten(im.open_image(pair[1], f"prompts[{i}]: ground truth"))
        if truth.size != image.size:
            raise ValueError(
                f"prompts[{i}]: expected a ground truth of its image's size, "
                f"{im.size_text(image.size)} pixels, got {im.size_text(truth.size)}"
            )
        if image.size != photo.size and not resized:
            raise ValueError(
                f"prompts[{i}]: expected images of the query's size, {im.size_text(photo.size)} pixels, got "
                f"{im.size_text(image.size)}; give width and height to resize all to one"
            )
        pairs.append((image, truth))
    return pairs, photo

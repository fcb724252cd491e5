"""Personalize Anything from photos to a picture: subjects of photos at given places in a new image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..diffusers import apply
from ..methods import PersonalizeAnything, PersonalSubject
from ..methods.personalize_anything import noised
from ..methods.shared.token_masks import moved, token_mask
from . import images as im
from .images import ImageLike
from .shared.arguments import check_count, check_number, check_texts, noise_seed
from .shared.flux_parts import FluxParts


@dataclass
class PersonalizeAnythingOutput:
    """Result of PersonalizeAnythingPipeline.

    Attributes:
        image: the result, RGB, of the size at which the model works.
        latents: packed, (1, image tokens, channels).
        method: that was used, with the subjects as image tokens.
        seed: that reproduces the result; None where a generator was given.
    """

    image: Image.Image
    latents: Tensor
    method: PersonalizeAnything
    seed: int | None


class PersonalizeAnythingPipeline(FluxParts):
    """Personalize Anything (arXiv 2503.12590) on FLUX.1, without training.

    Each step is one call of the model on the photos and the image. The photos' latents are noised to the
    step's level, without an inversion (see PersonalizeAnything). Defaults are the released demo's.

    Examples:
        ```python
        pipe = PersonalizeAnythingPipeline.from_pretrained(
            "black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16
        ).to("cuda")
        pipe("a cat on a beach", "cat.png", "cat-mask.png", move=(0, 128)).image.save("out.png")
        ```

    Args:
        pipe: a diffusers FluxPipeline.
        backend: as in flashbrush.attention.

    Raises:
        TypeError: another pipeline.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        subject: ImageLike | Sequence[ImageLike],
        mask: ImageLike | Sequence[ImageLike],
        *,
        move: tuple[int, int] | Sequence[tuple[int, int]] = (0, 0),
        subject_prompt: str = "",
        method: PersonalizeAnything | None = None,
        steps: int = 28,
        guidance_scale: float = 3.5,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        max_sequence_length: int = 512,
        progress: bool = True,
    ) -> PersonalizeAnythingOutput:
        """Make an image with subjects of photos.

        Args:
            prompt: what the image shows.
            subject: a photo, or several of one size: files, PIL images, or uint8 arrays.
            mask: of each photo's size, white on the subject.
            move: shift of the subject from its place in the photo, (pixels down, pixels to the right) of the
                result, multiples of a token's 16; one for all subjects or one for each.
            subject_prompt: what the photos show.
            method: its knobs; the pipeline sets its subjects. None: PersonalizeAnything's defaults.
            steps: denoising steps.
            guidance_scale: of FLUX's embedded guidance.
            width: of the result, a multiple of 16; None: near the photo's own.
            height: the same.
            seed: of the noise; None: drawn from torch's default generator.
            generator: in place of a seed.
            max_sequence_length: text tokens, at most the tokenizer's.
            progress: show a progress bar.

        Returns:
            The picture, and what reproduces it.

        Raises:
            TypeError, ValueError, FileNotFoundError: wrong input; the message names the argument.
            FloatingPointError: the latents are no longer finite.
        """
        check_texts(prompt=prompt, subject_prompt=subject_prompt)
        check_count("steps", steps)
        check_number("guidance_scale", guidance_scale)
        if method is not None and not isinstance(method, PersonalizeAnything):
            raise TypeError(f"method: expected a PersonalizeAnything, got {type(method).__name__}")
        base, reported = noise_seed(seed, generator)
        pictures: list[Any]
        outlines: list[Any]
        pictures, outlines = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (subject, mask))
        moves = [move] * len(pictures) if all(isinstance(n, int) for n in move) else list(move)
        for name, given in (("mask", outlines), ("move", moves)):
            if len(given) != len(pictures):
                raise ValueError(f"{name}: expected {len(pictures)}, one for each subject, got {len(given)}")
        photos = [im.flatten(im.open_image(picture, "subject")) for picture in pictures]
        if wrong := [photo.size for photo in photos if photo.size != photos[0].size]:
            raise ValueError(f"subject: expected photos of one size, got {photos[0].size} and {wrong[0]}")
        holes = [im.open_mask(outline, photos[0].size) for outline in outlines]
        side = 2 * self.pipe.vae_scale_factor  # pixels of a token
        size = im.panel_size(photos[0].size, width=width, height=height, multiple=side)
        subjects = [
            self._subject(n, im.resize_mask(hole, size), where)
            for n, (hole, where) in enumerate(zip(holes, moves, strict=True))
        ]
        ready = PersonalizeAnything(subjects) if method is None else replace(method, subjects=subjects)

        encoded = [self._encode(im.resize_photo(photo, size)) for photo in photos]
        clean, ids = torch.cat([latents for latents, _ in encoded]), encoded[0][1]
        draw = torch.Generator().manual_seed(base)
        noise, latents = (
            torch.randn(shape, generator=draw).to(clean) for shape in (clean.shape, clean[:1].shape)
        )
        texts = [self._embed(text, max_sequence_length) for text in (subject_prompt, prompt)]
        # Batch items: a reconstruction of each photo, then the image.
        text = (
            *(
                torch.cat([a.expand(len(photos), *a.shape[1:]), b])
                for a, b in zip(*(t[:2] for t in texts), strict=True)
            ),
            texts[0][2],
        )
        times = self._times(steps, clean.shape[1])
        with (
            apply(self.pipe.transformer, ready, backend=self.backend) as handle,
            self._bar("sampling", steps, progress) as bar,
        ):
            handle.grid = (size[1] // side, size[0] // side)
            for i, (time, lower) in enumerate(pairwise(times)):
                handle.set_step(i, steps, time)
                batch = torch.cat([noised(clean, noise, time), latents])
                latents = (
                    latents + (lower - time) * self._velocity(batch, ids, time, text, guidance_scale)[-1:]
                )
                bar.update()
        return PersonalizeAnythingOutput(self._decode(latents, size), latents, ready, reported)

    def _subject(self, item: int, mask: Image.Image, move: Any) -> PersonalSubject:
        side = 2 * self.pipe.vae_scale_factor
        if len(move) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n % side for n in move):
            raise ValueError(
                f"move: expected (pixels down, pixels to the right), multiples of {side}, got {move!r}"
            )
        tokens = token_mask(self._cells(mask)).unflatten(0, (mask.height // side, mask.width // side))
        return PersonalSubject(
            tokens, moved(tokens, move[0] // side, move[1] // side) if any(move) else None, item
        )

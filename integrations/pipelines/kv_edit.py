"""KV-Edit from a photo to a picture: new content in a region, with a background that does not change."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..diffusers import Handle, apply
from ..methods import KVEdit
from ..methods.kv_edit import paste, reblend
from ..methods.shared.token_masks import packed_mask, token_mask
from . import images as im
from .images import ImageLike
from .inversion.ddpm import steps_left_out
from .shared.arguments import check_count, check_number, check_texts
from .shared.flux_parts import FluxParts


class KVInversion(NamedTuple):
    """A photo and its inverted latents, from which any number of edits start."""

    photo: Image.Image
    levels: list[Tensor]  # (1, image tokens, channels) at every noise level, the clean latents first
    ids: Tensor  # of the image tokens, (tokens, 3)


@dataclass
class KVEditOutput:
    """Result of KVEditPipeline.

    Attributes:
        image: the result, RGB, of the photo's own size; outside of the mask the photo's own pixels.
        latents: packed, (1, image tokens, channels); outside of the masked tokens the photo's.
        tokens: indices of the image tokens that were edited.
        size: (width, height) in pixels at which the model saw the photo.
        mask: of the photo's size.
        method: with the keys and values that the inversion kept; all edits of one inversion share it.
        inversion: from which KVEditPipeline.again() starts.
    """

    image: Image.Image
    latents: Tensor
    tokens: Tensor
    size: tuple[int, int]
    mask: Image.Image
    method: KVEdit
    inversion: KVInversion


class KVEditPipeline(FluxParts):
    """KV-Edit (arXiv 2502.17363) on FLUX.1, without training.

    The photo is inverted with all of its tokens (Euler steps). The edit's calls hold only text and masked
    tokens, so a small mask makes them cheap. again() makes more edits from one inversion. Defaults are the
    released code's.

    Examples:
        ```python
        pipe = KVEditPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
        pipe("park.jpg", "bench.png", "a bench in a park", source_prompt="a park").image.save("out.png")
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
        image: ImageLike,
        mask: ImageLike,
        prompt: str,
        *,
        source_prompt: str = "",
        steps: int = 28,
        skip: int | None = None,
        guidance_scale: float = 5.5,
        inversion_guidance: float = 1.5,
        attn_scale: float = 1.0,
        masked_inversion: bool = False,
        keep_device: torch.device | str | None = None,
        keep_dtype: torch.dtype | None = None,
        width: int | None = None,
        height: int | None = None,
        paste_back: bool = True,
        max_sequence_length: int = 512,
        progress: bool = True,
    ) -> KVEditOutput:
        """Edit a region of a photo.

        Args:
            image: a file, a PIL image, or a uint8 array.
            mask: of the image's size, white where to paint.
            prompt: what the result shows.
            source_prompt: what the photo shows.
            steps: levels of noise.
            skip: steps left out at the noisy end; None: a seventh, as 4 of 28. The more are left out, the
                more of the photo remains in the region.
            guidance_scale: FLUX.1-dev's embedded guidance of the edit.
            inversion_guidance: the same of the inversion.
            attn_scale: logit bias of the background's keys, as in KVEdit.
            masked_inversion: as in KVEdit.
            keep_device: where the inversion's keys and values are kept, as in KVEdit.
            keep_dtype: of the kept keys and values, as in KVEdit.
            width: at which the model sees the photo, a multiple of 16; None: near the photo's own.
            height: the same.
            paste_back: put the painted region into the photo, whose other pixels stay identical; False:
                return the model's picture.
            max_sequence_length: text tokens, at most the tokenizer's.
            progress: show a progress bar.

        Returns:
            The picture, and the inversion for further edits.

        Raises:
            TypeError, ValueError, FileNotFoundError: wrong input; the message names the argument.
            FloatingPointError: the latents are no longer finite.
        """
        check_texts(prompt=prompt, source_prompt=source_prompt)
        check_count("steps", steps)
        skip = steps_left_out(skip, steps, (4, 28))
        check_number("guidance_scale", guidance_scale)
        check_number("inversion_guidance", inversion_guidance)
        pipe = self.pipe
        photo = im.flatten(im.open_image(image))
        hole = im.open_mask(mask, photo.size)
        size = im.panel_size(photo.size, width=width, height=height, multiple=2 * pipe.vae_scale_factor)
        clean, ids = self._encode(im.resize_photo(photo, size))
        cells = self._cells(im.resize_mask(hole, size))
        times = self._times(steps, clean.shape[1])[skip:]
        method = KVEdit(
            token_mask(cells),
            times,
            attn_scale=attn_scale,
            masked_inversion=masked_inversion,
            keep_device=keep_device,
            keep_dtype=keep_dtype,
        )
        source, target = (self._embed(text, max_sequence_length) for text in (source_prompt, prompt))
        with (
            apply(pipe.transformer, method, backend=self.backend) as handle,
            self._bar("inverting, editing", 2 * len(times) - 2, progress) as bar,
        ):
            inversion = KVInversion(
                photo, self._invert(handle, clean, ids, times, source, inversion_guidance, bar), ids
            )
            final = self._edit(handle, inversion, cells, target, guidance_scale, bar)
        return self._output(inversion, method, final, hole, size, paste_back)

    @torch.no_grad()
    def again(
        self,
        done: KVEditOutput,
        prompt: str,
        *,
        mask: ImageLike | None = None,
        guidance_scale: float = 5.5,
        attn_scale: float = 1.0,
        paste_back: bool = True,
        max_sequence_length: int = 512,
        progress: bool = True,
    ) -> KVEditOutput:
        """Edit the photo of an earlier result again, without another inversion.

        Examples:
            ```python
            done = pipe("park.jpg", "bench.png", "a bench in a park", source_prompt="a park")
            pipe.again(done, "a fountain in a park").image.save("fountain.png")
            ```

        Args:
            done: a result of this pipeline. Its method takes the new mask and scale.
            prompt: what the result shows.
            mask: another mask, not possible after masked_inversion; None: the same.
            guidance_scale: as in the call.
            attn_scale: as in the call.
            paste_back: as in the call.
            max_sequence_length: as in the call.
            progress: as in the call.

        Returns:
            The new picture.

        Raises:
            TypeError, ValueError, FileNotFoundError: wrong input; the message names the argument.
            FloatingPointError: the latents are no longer finite.
        """
        if not isinstance(done, KVEditOutput):
            raise TypeError(f"done: expected a KVEditOutput, got {type(done).__name__}")
        check_texts(prompt=prompt)
        check_number("guidance_scale", guidance_scale)
        inversion, method = done.inversion, done.method
        hole = done.mask if mask is None else im.open_mask(mask, inversion.photo.size)
        cells = self._cells(im.resize_mask(hole, done.size))
        method.mask, method.attn_scale = token_mask(cells), attn_scale
        text = self._embed(prompt, max_sequence_length)
        with (
            apply(self.pipe.transformer, method, backend=self.backend) as handle,
            self._bar("editing", len(method.times) - 1, progress) as bar,
        ):
            final = self._edit(handle, inversion, cells, text, guidance_scale, bar)
        return self._output(inversion, method, final, hole, done.size, paste_back)

    def _invert(
        self,
        handle: Handle,
        clean: Tensor,
        ids: Tensor,
        times: list[float],
        text: tuple,
        guidance: float,
        bar: Any,
    ) -> list[Tensor]:
        """The photo's latents at every noise level, the clean ones first."""
        levels = [clean]
        for i, (time, upper) in enumerate(pairwise(times[::-1])):
            handle.set_step(i, len(times) - 1, time)
            levels.append(levels[-1] + (upper - time) * self._velocity(levels[-1], ids, time, text, guidance))
            bar.update()
        return levels

    def _edit(
        self, handle: Handle, inversion: KVInversion, cells: Tensor, text: tuple, guidance: float, bar: Any
    ) -> Tensor:
        """The latents of an edit; outside of the method's masked tokens they are the photo's."""
        method: Any = handle.method
        levels, steps = inversion.levels, len(method.times) - 1
        inside, tokens = (
            t.to(levels[0].device)
            for t in (packed_mask(cells, self.pipe.vae.config.latent_channels), method.tokens)
        )
        method.phase = "edit"
        handle.reset()
        latents = levels[-1][:, tokens]
        for i, (time, lower) in enumerate(pairwise(method.times)):
            handle.set_step(i, steps, time)
            latents = reblend(latents, levels[steps - i], inside, tokens)
            latents = latents + (lower - time) * self._velocity(
                latents, inversion.ids[tokens], time, text, guidance
            )
            bar.update()
        return paste(levels[0], latents, tokens)

    def _output(
        self,
        inversion: KVInversion,
        method: KVEdit,
        final: Tensor,
        hole: Image.Image,
        size: tuple[int, int],
        paste_back: bool,
    ) -> KVEditOutput:
        photo, made = inversion.photo, self._decode(final, size)
        whole = (0, 0, *photo.size)
        made = im.paste_back(made, photo, hole, whole) if paste_back else im.resize_photo(made, photo.size)
        return KVEditOutput(made, final, method.tokens, size, hole, method, inversion)

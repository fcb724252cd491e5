"""In-Context Brush from photos to a picture: insert the subject of one photo into the hole of another."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...bindings import blend_latents
from ..diffusers import Handle, apply, compose
from ..methods import AttentionMaps, InContextBrush
from ..methods.shared.token_alignment import word_tokens
from . import images as im
from .images import ImageLike
from .shared.arguments import check_count, noise_seed
from .subject import DETECTOR, SEGMENTER, SubjectFinder


@dataclass
class InContextBrushOutput:
    """Result of InContextBrushPipeline; lists have an entry for each item of the batch.

    Attributes:
        images: the results: of the photo's own size with paste_back, else of the panel's.
        diptychs: input of the model: the subject's panel above the photo's.
        masks: where the model paints, of the diptych's size.
        boxes: the part of the photo that the lower panel shows, (left, top, right, bottom) in pixels.
        latents: final latents, packed, (batch, image tokens, channels).
        source_latents: latents of the diptych, the same.
        known: tokens that are not painted, (batch, image tokens) bool.
        head_gains: of the target's rows, (steps, layers, batch, heads) float32.
        layer_kinds: "double" or "single" for each layer of head_gains.
        seeds: that reproduce the results; None where a generator was given.
        mass: attention of each of `segments` to each of them, summed over rows, (steps, layers, batch, heads,
            row segments, key segments) float32; None without `maps`.
        segments: names of the segments of mass.
    """

    images: list[Image.Image]
    diptychs: list[Image.Image]
    masks: list[Image.Image]
    boxes: list[tuple[int, int, int, int]]
    latents: Tensor
    source_latents: Tensor
    known: Tensor
    head_gains: Tensor
    layer_kinds: list[str]
    seeds: list[int | None]
    mass: Tensor | None = None
    segments: tuple[str, ...] = ()


class InContextBrushPipeline:
    """In-Context Brush (arXiv 2505.20271) on FLUX.1-Fill, without training.

    The subject, on white, is the upper panel of a vertical diptych, the photo is the lower one. After every
    step tokens outside the mask are set to the photo's latents, noised with one fixed noise to the step's
    level; after the last step they are the photo's latents.

    The wrapped FluxFillPipeline is `pipe`; offload it, load LoRAs into it or compile its transformer as
    usual.

    Examples:
        ```python
        pipe = InContextBrushPipeline.from_pretrained(
            "black-forest-labs/FLUX.1-Fill-dev", dtype=torch.bfloat16
        ).to("cuda")
        result = pipe(
            "a cat on a table", subject="cat.png", subject_name="cat", image="table.jpg", mask="hole.png"
        )
        result.images[0].save("out.png")
        ```

    Args:
        pipe: a diffusers FluxFillPipeline.
        finder: finds a subject by its name; None: loaded when a name is first given.
        backend: as in flashbrush.attention.

    Raises:
        TypeError: another pipeline.
        ValueError: a transformer without FLUX Fill's inputs for mask and masked photo.
    """

    def __init__(self, pipe: Any, *, finder: SubjectFinder | None = None, backend: str = "auto") -> None:
        from diffusers import FluxFillPipeline

        if not isinstance(pipe, FluxFillPipeline):
            raise TypeError(f"pipe: expected a FluxFillPipeline, got {type(pipe).__name__}")
        # Of a 2x2 block of latents: the latents, the masked photo's latents, and the mask's pixels.
        expected = 8 * pipe.vae.config.latent_channels + 4 * pipe.vae_scale_factor**2
        if (channels := pipe.transformer.config.in_channels) != expected:
            raise ValueError(
                f"model: expected a transformer of FLUX Fill, with {expected} input channels, "
                f"got one with {channels}"
            )
        self.pipe: Any = pipe  # diffusers annotates its call more narrowly than it accepts
        self.finder, self.backend = finder, backend
        self._finder_models: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        detector: str | os.PathLike[str] = DETECTOR,
        segmenter: str | os.PathLike[str] = SEGMENTER,
        backend: str = "auto",
        **options: Any,
    ) -> InContextBrushPipeline:
        """Load from a hub id or a diffusers folder; safetensors only.

        Args:
            model: FLUX.1-Fill-dev, or another checkpoint of FluxFillPipeline.
            detector: object detection model that finds a subject by its name, loaded when first needed.
            segmenter: SAM model that outlines it, loaded when first needed.
            backend: as in flashbrush.attention.
            options: passed on to FluxFillPipeline.from_pretrained (dtype, device_map, revision ...). The
                default dtype is bfloat16 for all parts.

        Raises:
            OSError: not found.
            ValueError: a folder, or weights, of another kind of model.
        """
        from diffusers import FluxFillPipeline

        if os.path.isdir(model):
            _check_folder(model)
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.bfloat16)
        pipe = FluxFillPipeline.from_pretrained(model, use_safetensors=True, **options)
        self = cls(pipe, backend=backend)
        self._finder_models = {"detector": detector, "segmenter": segmenter}
        return self

    def to(self, *args: Any, **options: Any) -> InContextBrushPipeline:
        """Move the model, as DiffusionPipeline.to; returns self."""
        self.pipe.to(*args, **options)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        subject: ImageLike | Sequence[ImageLike],
        image: ImageLike | Sequence[ImageLike],
        mask: ImageLike | Sequence[ImageLike],
        subject_mask: ImageLike | Sequence[ImageLike] | None = None,
        subject_name: str | Sequence[str] | None = None,
        alpha_prompt: float | None = None,
        alpha_subject: float | None = None,
        gain_span: float | None = None,
        method: InContextBrush | None = None,
        width: int | None = None,
        height: int | None = None,
        padding_mask_crop: int | None = None,
        subject_fill: float = 0.9,
        steps: int = 50,
        guidance_scale: float = 30.0,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        blend: bool = True,
        hole_only: bool = False,
        paste_back: bool = True,
        max_sequence_length: int = 512,
        maps: AttentionMaps | None = None,
        progress: bool = True,
    ) -> InContextBrushOutput:
        """Insert subjects. A list makes a batch; a single value is used for all items of the batch.

        Args:
            prompt: what the result shows.
            subject: the photo of the subject: a file, a PIL image, or a uint8 array.
            image: the photo to insert into.
            mask: of image's size, white where to paint.
            subject_mask: of subject's size, white on the subject. Without a mask and a name, the subject's
                own transparency is used; an opaque subject is used whole.
            subject_name: what to look for in the subject's photo, in place of a mask.
            alpha_prompt: weight added to the target's attention to the prompt; None: the method's.
            alpha_subject: the same for the subject; None: the method's.
            gain_span: range of the head gains; None: the method's.
            method: all knobs; None: InContextBrush(), the released code's.
            width: of a panel, a multiple of 16; None: from the height, or near the size of what is shown.
            height: the same.
            padding_mask_crop: show the model only the mask's bounding box and this many pixels around it,
                widened to the panel's proportions where the photo has room; None: the whole photo.
            subject_fill: share of its panel's width or height that a subject with a mask takes.
            steps: denoising steps.
            guidance_scale: of FLUX Fill's embedded guidance.
            seed: of item 0, counted up for the others; or one for each; None: drawn from torch's default
                generator.
            generator: in place of a seed: one for all items, or one for each.
            blend: set tokens outside of the mask back after every step.
            hole_only: only tokens of the mask get the weights, see InContextBrush.hole; False: all tokens of
                the photo's panel, as in the paper.
            paste_back: put the painted region into the photo, whose other pixels stay identical.
            max_sequence_length: text tokens, at most the tokenizer's.
            maps: record what image tokens attend to (both panels, the subject's first); the output then has
                mass.
            progress: show a progress bar.

        Returns:
            The pictures, what the model was given, and the head gains.

        Raises:
            TypeError, ValueError, FileNotFoundError: wrong input; the message names the argument.
            FloatingPointError: the latents are no longer finite.
        """
        given = {
            "prompt": prompt,
            "subject": subject,
            "image": image,
            "mask": mask,
            "subject_mask": subject_mask,
            "subject_name": subject_name,
            "seed": seed,
            "generator": generator,
        }
        items = _items(given)
        check_count("steps", steps)
        check_count("max_sequence_length", max_sequence_length)
        if (
            not isinstance(guidance_scale, (int, float))
            or not math.isfinite(guidance_scale)
            or guidance_scale < 0
        ):
            raise ValueError(f"guidance_scale: expected a finite number of 0 or more, got {guidance_scale!r}")
        method = InContextBrush() if method is None else method
        if not isinstance(method, InContextBrush):
            raise TypeError(f"method: expected an InContextBrush, got {type(method).__name__}")
        if not method.subject_first or method.subject_tokens is not None or method.hole is not None:
            raise ValueError(
                "method: the diptych has the subject first, in one half, and the mask says where its hole "
                "is; got another order, subject_tokens or a hole"
            )
        knobs = {"alpha_prompt": alpha_prompt, "alpha_subject": alpha_subject, "gain_span": gain_span}
        method = replace(method, **{name: value for name, value in knobs.items() if value is not None})
        if (order := getattr(self.pipe.scheduler, "order", 1)) != 1:
            raise ValueError(f"scheduler: expected one with a model call per step, got one of order {order}")
        if not isinstance(subject_fill, (int, float)) or not 0 < subject_fill <= 1:
            raise ValueError(f"subject_fill: expected a number above 0, up to 1, got {subject_fill!r}")
        photos, holes, panels = [], [], []
        for item in items:
            photo = im.open_image(item["image"], "image")
            photos.append(im.flatten(photo))
            holes.append(im.open_mask(item["mask"], photo.size))
            panels.append(self._subject(item))
        if wrong := [p.size for p in photos if p.size != photos[0].size]:
            raise ValueError(
                f"image: expected photos of one size in a batch, got {photos[0].size} and {wrong[0]}"
            )
        boxes, size = self._frames(photos, holes, width, height, padding_mask_crop)
        diptychs = [
            im.stack(
                im.subject_panel(picture, outline, size, subject_fill), im.resize_photo(photo.crop(box), size)
            )
            for (picture, outline), photo, box in zip(panels, photos, boxes, strict=True)
        ]
        nothing = Image.new("L", size, 0)
        masks = [
            im.stack(nothing, im.resize_mask(hole.crop(box), size))
            for hole, box in zip(holes, boxes, strict=True)
        ]
        latents = self._source_latents(diptychs)
        known = torch.stack([~self._tokens(mask) for mask in masks]).to(latents.device)
        if hole_only:
            method = replace(method, hole=~known.cpu())
        generators = [item["generator"] for item in items]
        # Drawn for each item on its generator's device: the noise depends on neither the model's device nor
        # the batch.
        noise = torch.stack(
            [torch.randn(latents.shape[1:], generator=g, device=g.device).to(latents) for g in generators]
        )

        bar = dict(getattr(self.pipe, "_progress_bar_config", {}))
        if not progress:
            self.pipe.set_progress_bar_config(disable=True)
        loop = _Steps(latents, noise, known, steps, blend)
        try:
            used, fields = (method, ("gain",)) if maps is None else (compose(method, maps), ("gain", "mass"))
            with apply(self.pipe.transformer, used, stats=fields, backend=self.backend) as handle:
                side = 2 * self.pipe.vae_scale_factor  # pixels of a token
                handle.grid = (2 * size[1] // side, size[0] // side)
                handle.set_step(0, steps, 1.0)
                loop.handle = handle
                canvases = self.pipe(
                    prompt=[item["prompt"] for item in items],
                    image=diptychs,
                    mask_image=masks,
                    width=size[0],
                    height=2 * size[1],
                    latents=noise.clone(),
                    generator=generators,  # the pipeline draws the masked photo's latents
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    max_sequence_length=min(max_sequence_length, self.pipe.tokenizer_2.model_max_length),
                    callback_on_step_end=loop,
                ).images
                if loop.last is None:
                    raise RuntimeError("the run was interrupted before its first step")
                gains, mass, kinds = _statistics(handle, steps)
        finally:
            self.pipe._progress_bar_config = bar
        results = [im.lower_panel(canvas) for canvas in canvases]
        if paste_back:
            results = list(map(im.paste_back, results, photos, holes, boxes))
        seeds = [item["seed"] for item in items]
        made = InContextBrushOutput(
            results, diptychs, masks, boxes, loop.last, latents, known, gains, kinds, seeds
        )
        return made if maps is None else replace(made, mass=mass, segments=method.segments)

    def region_tokens(
        self,
        region: ImageLike | None,
        *,
        image: ImageLike,
        mask: ImageLike,
        width: int | None = None,
        height: int | None = None,
        padding_mask_crop: int | None = None,
    ) -> list[int]:
        """The image tokens of a region of the photo in a call with these arguments, for `maps`.

        Args:
            region: of image's size, white on the region; None: all of the photo that the model sees.
            image: as in the call.
            mask: as in the call.
            width: as in the call.
            height: as in the call.
            padding_mask_crop: as in the call.

        Returns:
            Indices of the tokens.

        Raises:
            TypeError, FileNotFoundError: as the call.
            ValueError: the region has no token; as the call.
        """
        photo = im.open_image(image, "image")
        (box,), size = self._frames(
            [photo], [im.open_mask(mask, photo.size)], width, height, padding_mask_crop
        )
        white = Image.new("L", size, 255)
        if region is not None:
            # A token that shows any part of the region counts: thin regions are not lost.
            white = im.open_mask(region, photo.size, "region").crop(box).resize(size, Image.Resampling.BOX)
        tokens = self._tokens(im.stack(Image.new("L", size, 0), white))
        if not bool(tokens.any()):
            raise ValueError("region: the model sees nothing of it")  # it lies outside of the crop
        return tokens.nonzero().flatten().tolist()

    def word_tokens(self, prompt: str, word: str, max_sequence_length: int = 512) -> list[int]:
        """The text tokens of a word or phrase of the prompt, for `maps`.

        Args:
            prompt: the whole prompt.
            word: a word or phrase; all its occurrences count.
            max_sequence_length: as in the call.

        Returns:
            Indices of the tokens.

        Raises:
            ValueError: it is not in the prompt, or only in the part that is cut off.
        """
        tokenizer = self.pipe.tokenizer_2
        return word_tokens(prompt, word, tokenizer, min(max_sequence_length, tokenizer.model_max_length))

    def _frames(
        self,
        photos: list[Image.Image],
        holes: list[Image.Image],
        width: int | None,
        height: int | None,
        crop: int | None,
    ) -> tuple[list[tuple[int, int, int, int]], tuple[int, int]]:
        """(the box of each photo that the model sees, a panel's (width, height))."""
        side = 2 * self.pipe.vae_scale_factor
        size = im.panel_size(photos[0].size, width=width, height=height, multiple=side)
        if crop is None:
            return [(0, 0, *photo.size) for photo in photos], size
        boxes = [im.crop_box(hole, crop, size[0] / size[1]) for hole in holes]
        shown = boxes[0][2] - boxes[0][0], boxes[0][3] - boxes[0][1]
        return boxes, im.panel_size(shown, width=width, height=height, multiple=side)

    def _subject(self, item: dict[str, Any]) -> tuple[Image.Image, Image.Image | None]:
        """The subject's photo and its mask; None: the whole photo is the subject."""
        picture = im.open_image(item["subject"], "subject")
        if item["subject_mask"] is not None:
            return picture, im.open_mask(item["subject_mask"], picture.size, "subject_mask", "subject")
        if item["subject_name"] is not None:
            if self.finder is None:
                self.finder = SubjectFinder.from_pretrained(
                    **self._finder_models, device=self.pipe._execution_device
                )
            return picture, self.finder(picture, item["subject_name"])
        alpha = im.alpha_mask(picture)
        return picture, None if alpha is None else im.check_mask(alpha, "subject: its transparency")

    def _source_latents(self, diptychs: list[Image.Image]) -> Tensor:
        """The autoencoder's mean latents, packed: (batch, image tokens, channels)."""
        pipe, vae = self.pipe, self.pipe.vae
        pixels = pipe.image_processor.preprocess(diptychs).to(pipe._execution_device, vae.dtype)
        latents = (
            vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor
        ) * vae.config.scaling_factor
        return pipe._pack_latents(latents.to(pipe.transformer.dtype), *latents.shape)

    def _tokens(self, mask: Image.Image) -> Tensor:
        """Tokens in which any pixel of the mask is on, (image tokens,) bool."""
        return torch.from_numpy(im.mask_cells(mask, 2 * self.pipe.vae_scale_factor)).flatten()


def _items(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each item of the batch, with a generator for each."""
    if given["subject_mask"] is not None and given["subject_name"] is not None:
        raise ValueError("subject_mask: expected it or subject_name, got both")
    if given["seed"] is not None and given["generator"] is not None:
        raise ValueError("seed: expected it or generator, got both")
    counts = {name: len(value) for name, value in given.items() if isinstance(value, (list, tuple))}
    batch = max(counts.values(), default=1)
    for name, count in counts.items():
        if count not in (1, batch) or count == 0:
            raise ValueError(
                f"{name}: expected 1 or {batch} entries, as the longest argument has, got {count}"
            )
    items = []
    for i in range(batch):
        item = {n: v[i % len(v)] if isinstance(v, (list, tuple)) else v for n, v in given.items()}
        if not isinstance(item["prompt"], str):
            raise TypeError(f"prompt: expected a string, got {type(item['prompt']).__name__}")
        if item["generator"] is None:
            item["seed"] = _seed(item["seed"], 0 if "seed" in counts else i)
            item["generator"] = torch.Generator().manual_seed(item["seed"])
        elif not isinstance(item["generator"], torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(item['generator']).__name__}")
        items.append(item)
    return items


def _seed(seed: Any, offset: int) -> int:
    """The seed of an item, `offset` above the given one; drawn for each item where none is given."""
    base, _ = noise_seed(seed, None)
    return base if seed is None else (base + offset) % 2**63


class _Steps:
    """The callback after each step: sets known tokens back, and plans the next step."""

    def __init__(self, source: Tensor, noise: Tensor, known: Tensor, steps: int, blend: bool) -> None:
        self.source, self.noise, self.steps, self.blend = source, noise, steps, blend
        self.painted = ~known[:, :, None]
        self.sigmas: list[float] = []
        self.handle: Handle | None = None
        self.last: Tensor | None = None

    def __call__(
        self, pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if index == 0:
            self.sigmas = pipe.scheduler.sigmas.tolist()  # read once: they may lie on the GPU
        sigma = self.sigmas[index + 1]
        latents = tensors["latents"]
        if self.blend:
            latents = blend_latents(latents, self.source, self.noise, self.painted, sigma)
        if index + 1 < self.steps:
            assert self.handle is not None
            self.handle.set_step(index + 1, self.steps, sigma)
        elif not bool(latents.isfinite().all()):
            raise FloatingPointError(
                f"the latents are no longer finite in {latents.dtype}: try bfloat16, or smaller knobs"
            )
        self.last = latents
        return {"latents": latents}


def _statistics(handle: Handle, steps: int) -> tuple[Tensor, Tensor, list[str]]:
    """The handle's statistics of all steps and layers.

    Returns:
        (gains of the last row segment, the target's, (steps, layers, batch, heads); mass; kinds of the
        layers). NaN where a layer was not run in a step, as with diffusers' caches of attention.
    """
    records = handle.stats
    layers = sorted({(r.layer, r.kind) for r in records})
    by_place = {(r.step, r.layer): r.stats for r in records}

    def gathered(name: str) -> Tensor:
        nothing = torch.full_like(
            getattr(records[0].stats, name), torch.nan, dtype=torch.float32, device="cpu"
        )
        found = {place: getattr(stats, name).float().cpu() for place, stats in by_place.items()}
        return torch.stack(
            [torch.stack([found.get((step, i), nothing) for i, _ in layers]) for step in range(steps)]
        )

    gains, mass = gathered("gain"), gathered("mass")
    return gains[..., -1], mass, [kind for _, kind in layers]


def _check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError unless the folder has all parts of a FluxFillPipeline."""
    parts = (
        "model_index.json",
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )
    if missing := [part for part in parts if not os.path.exists(os.path.join(folder, part))]:
        raise ValueError(
            f"model: {os.fspath(folder)} is not a FLUX-Fill checkpoint: it has no {', '.join(missing)}"
        )

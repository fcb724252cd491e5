"""flashbrush vicl: predict for a photo what pairs of photos and ground truths show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared.loading import load
from .shared.options import Backend, Device, Dtype, Offload, Out, Precision, Seed, Width
from .shared.output import check_pictures, write_pictures
from .shared.visual_icl_options import (
    Adain,
    Cache,
    Clip,
    Contrast,
    Gamma,
    Levels,
    Model,
    Skip,
    Task,
    Temperature,
    UseCache,
    check_cache,
    options,
)

if TYPE_CHECKING:
    from ..pipelines import VisualICLOutput, VisualICLPipeline


def vicl(
    prompt: Annotated[
        list[str], typer.Option(help="IMAGE:TRUTH, a photo and its ground truth; may be given again.")
    ],
    query: Annotated[Path, typer.Option(help="Photo to do the same to.")],
    task: Task,
    model: Model,
    output: Out,
    painted: Annotated[
        Path | None, typer.Option(help="Also write the picture as the model painted it.")
    ] = None,
    steps: Levels = 70,
    skip: Skip = None,
    gamma: Gamma = 3.5,
    temperature: Temperature = 0.4,
    contrast: Contrast = 1.67,
    clip: Clip = True,
    adain: Adain = True,
    seed: Seed = 0,
    width: Width = None,
    height: Width = None,
    cache: Cache = None,
    use_cache: UseCache = True,
    dtype: Precision = Dtype.bfloat16,
    device: Device = None,
    offload: Offload = False,
    backend: Backend = "auto",
) -> None:
    """Do to a photo what pairs of photos and ground truths show (SD-VICL).

    The picture that is written is what the task reads from the prediction: a mask, a filled box, classes or
    points in the ground truths' colours, edges, or the photo in colour.
    """
    from ..pipelines.images import size_text
    from ..pipelines.shared.visual_icl_tasks import check_palette, check_task, palette_of
    from ..pipelines.visual_icl import NEEDS_PALETTE, open_prompts

    check_task(task)
    files = {
        f"file {i} of prompt {n}": path
        for n, text in enumerate(prompt, 1)
        for i, path in enumerate(pair(text), 1)
    }
    check_pictures({"output": output, "painted": painted}, read={"query": query, **files})
    check_cache(cache)
    knobs = options(steps, skip, gamma, temperature, contrast, clip, adain, seed, width, height, use_cache)
    # Wrong input is refused before a model is loaded, which takes minutes.
    resized = width is not None or height is not None
    pairs, photo = open_prompts([pair(text) for text in prompt], query, resized=resized)
    if task in NEEDS_PALETTE:
        check_palette(palette_of([truth for _, truth in pairs]))
    pipe: VisualICLPipeline = load("VisualICLPipeline", model, dtype, device, offload, backend, cache=cache)
    result: VisualICLOutput = pipe(pairs, photo, task=task, **knobs)
    if result.size != photo.size:
        print(f"the model saw {query}, {size_text(photo.size)} pixels, at {size_text(result.size)} pixels")
    if use_cache:
        print(
            f"{result.reused} of {2 * len(pairs) + 1} inversions were there already, in {pipe.cache.folder}"
        )
    pictures: dict[Path, Any] = {output: lambda path: result.picture.save(path, quality=95)}
    if painted is not None:
        pictures[painted] = lambda path: result.image.save(path, quality=95)
    write_pictures(pictures)
    print(
        f"the picture is {output}" + (f", as the model painted it {painted}" if painted is not None else "")
    )


def pair(text: str) -> tuple[str, str]:
    """The two file names of "IMAGE:TRUTH".

    Raises:
        ValueError: not two names.
    """
    image, colon, truth = text.partition(":")
    if not image or not truth or ":" in truth:
        count = "one of them" if not truth or not image else "more than one colon"
        raise ValueError(
            f"prompt: expected a pair IMAGE:TRUTH, got {count if colon else 'one file'}: {text!r}"
        )
    return image, truth

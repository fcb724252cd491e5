"""flashbrush edit: change a photo by a changed prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_model import Backend, Device, Dtype, Offload, Out, Precision, Seed, load
from .cli_vicl import Model, Width
from .output import check_pictures, write_pictures

if TYPE_CHECKING:
    from .pipelines import PromptEditingOutput

Words = Annotated[list[str] | None, typer.Option(help="What the edit is about, in --prompt: it stays there. Repeat it.")]


def edit(
    method: Annotated[str, typer.Option(help="masactrl, plug-and-play, prompt-to-prompt or infedit.")],
    image: Annotated[Path, typer.Option(help="Photo to change.")],
    prompt: Annotated[str, typer.Option(help="What the result shows.")],
    model: Model,
    output: Out,
    source_prompt: Annotated[str, typer.Option(help="What the photo shows.")] = "",
    word: Words = None,
    source_word: Annotated[list[str] | None, typer.Option(help="The same in --source-prompt. Repeat it.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What guidance leads away from.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Levels of noise. Default: 50; infedit: 15.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Default: 7.5; plug-and-play: 10, infedit: 2.")] = None,
    inversion_iterations: Annotated[int, typer.Option(min=1, help="Calls of the model for a step of the inversion.")] = 1,
    reconstruction: Annotated[Path | None, typer.Option(help="Also write what the autoencoder leaves of the photo.")] = None,
    seed: Seed = 0,
    width: Width = None,
    height: Width = None,
    dtype: Precision = Dtype.bfloat16,
    device: Device = None,
    offload: Offload = False,
    backend: Backend = "auto",
) -> None:
    """Change a photo by a changed prompt, without training: four methods on Stable Diffusion's attention."""
    from .pipelines import images as im
    from .pipelines.prompt_editing import METHODS

    check_pictures({"output": output, "reconstruction": reconstruction})
    # Before a model is loaded, which takes minutes.
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if bool(word) != bool(source_word):
        raise ValueError("word: expected it together with --source-word, or neither")
    photo = im.open_image(image)
    im.panel_size((8, 8), width=width, height=height, multiple=8)
    pipe = load("PromptEditingPipeline", model, dtype, device, offload, backend)
    result: PromptEditingOutput = pipe(
        photo, prompt, source_prompt=source_prompt, method=method, words=word or (), source_words=source_word or (),
        negative_prompt=negative_prompt, steps=steps, guidance_scale=guidance,
        inversion_iterations=inversion_iterations, width=width, height=height, seed=seed,
    )  # fmt: skip
    if result.size != photo.size:
        print(f"the model saw {image}, {photo.width}x{photo.height} pixels, at {result.size[0]}x{result.size[1]} pixels")
    pictures: dict[Path, Any] = {output: lambda path: result.image.save(path, quality=95)}
    if reconstruction is not None:
        pictures[reconstruction] = lambda path: result.reconstruction.save(path, quality=95)
    write_pictures(pictures)
    print(f"the picture is {output}" + (f", the photo from the model {reconstruction}" if reconstruction else ""))

"""flashbrush edit: change a photo by a changed prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared.loading import load
from .shared.options import Backend, Device, Dtype, Offload, Out, Precision, Seed, Width
from .shared.output import check_pictures, write_pictures

if TYPE_CHECKING:
    from ..pipelines import PromptEditingOutput

# Methods on FLUX, and the options that each uses in addition to prompts, steps, guidance and size.
ON_FLUX = {"kv-edit": {"mask"}, "personalize-anything": {"mask", "move"}}
# Options that a method on Stable Diffusion does not use.
UNUSED = {"plug-and-play": {"word", "source_word"}, "infedit": {"inversion_iterations"}}
TOKEN = 16  # pixels of a FLUX token, each way
Words = Annotated[
    list[str] | None, typer.Option(help="Word of --prompt to which the edit is confined. Repeat it for more.")
]


def edit(
    method: Annotated[
        str,
        typer.Option(
            help="masactrl, plug-and-play, prompt-to-prompt, infedit; on FLUX kv-edit, personalize-anything."
        ),
    ],
    image: Annotated[Path, typer.Option(help="Photo to change.")],
    prompt: Annotated[str, typer.Option(help="What the result shows.")],
    model: Annotated[
        str, typer.Option(help="Stable Diffusion 1.x or 2.x, or FLUX.1: a Hugging Face name or a folder.")
    ],
    output: Out,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Of the image's size, white where kv-edit paints, or on personalize-anything's subject."
        ),
    ] = None,
    move: Annotated[
        tuple[int, int] | None,
        typer.Option(help="personalize-anything: pixels down and right, from where it is in the photo."),
    ] = None,
    source_prompt: Annotated[str, typer.Option(help="What the photo shows.")] = "",
    word: Words = None,
    source_word: Annotated[
        list[str] | None, typer.Option(help="The same word in --source-prompt. Repeat it for more.")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What guidance leads away from.")] = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Levels of noise. Default: 50; infedit: 15, on FLUX 28.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Default: 7.5; plug-and-play: 10, infedit: 2, kv-edit: 5.5, personalize-anything: 3.5."
        ),
    ] = None,
    inversion_iterations: Annotated[
        int | None, typer.Option(min=1, help="Calls of the model for a step of the inversion. Default: 1.")
    ] = None,
    reconstruction: Annotated[
        Path | None, typer.Option(help="Also write the photo as the autoencoder reconstructs it.")
    ] = None,
    seed: Seed = 0,
    width: Width = None,
    height: Width = None,
    dtype: Precision = Dtype.bfloat16,
    device: Device = None,
    offload: Offload = False,
    backend: Backend = "auto",
) -> None:
    """Change a photo by a changed prompt, without training: four methods on Stable Diffusion, two on FLUX."""
    from ..pipelines import images as im
    from ..pipelines.prompt_editing import METHODS
    from ..pipelines.shared.arguments import check_number

    check_pictures({"output": output, "reconstruction": reconstruction}, read={"image": image, "mask": mask})
    # Wrong input is refused before a model is loaded, which takes minutes.
    if method not in (*METHODS, *ON_FLUX):
        raise ValueError(f"method: expected one of {', '.join((*METHODS, *ON_FLUX))}, got {method!r}")
    given = {
        "mask": mask,
        "move": move,
        "word": word,
        "source_word": source_word,
        "negative_prompt": negative_prompt or None,
        "inversion_iterations": inversion_iterations,
        "reconstruction": reconstruction,
    }
    used = ON_FLUX.get(method, set(given) - {"mask", "move"} - UNUSED.get(method, set()))
    if wrong := [name for name, value in given.items() if value and name not in used]:
        raise ValueError(f"{wrong[0]}: {method} does not use it")
    if "mask" in used and mask is None:
        raise ValueError(f"mask: {method} needs one")
    if bool(word) != bool(source_word):
        raise ValueError("word: expected it together with --source-word, or neither")
    if guidance is not None:
        check_number("guidance", guidance)
    if move is not None and any(n % TOKEN for n in move):
        raise ValueError(
            f"move: expected (pixels down, pixels to the right), multiples of {TOKEN}, got {move}"
        )
    photo = im.open_image(image)
    if method in ON_FLUX:
        im.panel_size((TOKEN, TOKEN), width=width, height=height, multiple=TOKEN)
        assert mask is not None
        hole = im.open_mask(mask, photo.size)
        options = {"steps": steps, "guidance_scale": guidance, "width": width, "height": height}
        chosen = {name: value for name, value in options.items() if value is not None}
        if method == "kv-edit":
            pipe = load("KVEditPipeline", model, dtype, device, offload, backend)
            edited = pipe(photo, hole, prompt, source_prompt=source_prompt, **chosen)
            total = edited.latents.shape[1]
            print(f"{len(edited.tokens)} of {total} image tokens were computed in a step of the edit")
        else:
            pipe = load("PersonalizeAnythingPipeline", model, dtype, device, offload, backend)
            edited = pipe(
                prompt, photo, hole, move=move or (0, 0), subject_prompt=source_prompt, seed=seed, **chosen
            )
        write_pictures({output: lambda path: edited.image.save(path, quality=95)})
        print(f"the picture is {output}")
        return
    im.panel_size((8, 8), width=width, height=height, multiple=8)
    pipe = load("PromptEditingPipeline", model, dtype, device, offload, backend)
    result: PromptEditingOutput = pipe(
        photo,
        prompt,
        source_prompt=source_prompt,
        method=method,
        words=word or (),
        source_words=source_word or (),
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance,
        inversion_iterations=inversion_iterations or 1,
        width=width,
        height=height,
        seed=seed,
    )
    if result.size != photo.size:
        print(
            f"the model saw {image}, {im.size_text(photo.size)} pixels, at {im.size_text(result.size)} pixels"
        )
    pictures: dict[Path, Any] = {output: lambda path: result.image.save(path, quality=95)}
    if reconstruction is not None:
        pictures[reconstruction] = lambda path: result.reconstruction.save(path, quality=95)
    write_pictures(pictures)
    print(
        f"the picture is {output}"
        + (f", the photo's reconstruction {reconstruction}" if reconstruction else "")
    )

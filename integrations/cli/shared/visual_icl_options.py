"""Options of `vicl` and `eval vicl`, and the call's arguments that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import check_folder, check_packages

Model = Annotated[
    str, typer.Option(help="Stable Diffusion 1.x or 2.x: a Hugging Face name or a diffusers folder.")
]
Task = Annotated[
    str, typer.Option(help="segmentation, detection, semantic, keypoints, edges or colourisation.")
]
Levels = Annotated[int, typer.Option(min=1, help="Levels of noise of the whole run.")]
Skip = Annotated[int | None, typer.Option(min=0, help="Steps left out at the noisy end. Default: a seventh.")]
Gamma = Annotated[
    float, typer.Option(help="Of the swap guidance; it falls to 0 over the run. 0: plain sampling.")
]
Temperature = Annotated[float, typer.Option(help="Of the swapped attention.")]
Contrast = Annotated[float, typer.Option(help="Of the swapped attention's map about its mean; 1: none.")]
Clip = Annotated[bool, typer.Option(help="Keep the contrasted map within 0 and 1.")]
Adain = Annotated[bool, typer.Option(help="Match the latents' statistics to the ground truths'.")]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of inverted images. Default: in the user's cache folder.")
]
UseCache = Annotated[
    bool, typer.Option("--cached/--no-cached", help="Keep inverted images, and use those that are kept.")
]


def options(
    steps: int,
    skip: int | None,
    gamma: float,
    temperature: float,
    contrast: float,
    clip: bool,
    adain: bool,
    seed: int,
    width: int | None,
    height: int | None,
    use_cache: bool,
) -> dict[str, Any]:
    """Arguments of VisualICLPipeline's call.

    Raises:
        ValueError: a knob that the pipeline would refuse, found before a model is loaded.
    """
    from ...methods import VisualInContext
    from ...pipelines.images import panel_size
    from ...pipelines.inversion.ddpm import check_skip
    from ...pipelines.shared.arguments import check_number

    if skip is not None:
        check_skip(skip, steps)
    check_number("gamma", gamma)
    panel_size((8, 8), width=width, height=height, multiple=8)
    method = VisualInContext(temperature, contrast, (0.0, 1.0) if clip else None)
    return {
        "method": method,
        "steps": steps,
        "skip": skip,
        "gamma": gamma,
        "use_adain": adain,
        "seed": seed,
        "width": width,
        "height": height,
        "use_cache": use_cache,
    }


def check_cache(cache: Path | None) -> None:
    """Check that inversions can be kept.

    Raises:
        ValueError: `cache` is a file.
        ImportError: safetensors is not installed.
    """
    check_folder("cache", cache)
    check_packages("vicl", "safetensors")

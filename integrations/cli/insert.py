"""flashbrush insert: insert the subject of one photo into the hole of another."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared.loading import load, or_tiny
from .shared.options import Backend, Device, Dtype, Offload, Out, Precision, Seed, Steps
from .shared.output import check_packages, check_pictures, write_pictures

if TYPE_CHECKING:
    from ..pipelines import InContextBrushOutput


class Norm(StrEnum):
    minmax = "minmax"
    mean = "mean"
    max = "max"
    softmax = "softmax"


def insert(
    subject: Annotated[Path, typer.Option(help="Photo of the subject.")],
    image: Annotated[Path, typer.Option(help="Photo to insert it into.")],
    mask: Annotated[Path, typer.Option(help="Of the image's size, white where to paint.")],
    prompt: Annotated[str, typer.Option(help="What the result shows.")],
    output: Out,
    model: Annotated[
        str | None, typer.Option(help="FLUX.1-Fill: a Hugging Face name or a folder. Default: a tiny one.")
    ] = None,
    subject_mask: Annotated[
        Path | None, typer.Option(help="White on the subject. Default: its transparency, or all.")
    ] = None,
    subject_name: Annotated[
        str | None, typer.Option(help="Find the subject by its name, with Grounding DINO and SAM.")
    ] = None,
    alpha_prompt: Annotated[float, typer.Option(help="How much more the target reads of the prompt.")] = 0.3,
    alpha_subject: Annotated[
        float, typer.Option(help="How much more the target reads of the subject.")
    ] = 0.3,
    gain_span: Annotated[float, typer.Option(help="Range of the head gains: from 1 to 1 + this.")] = 0.2,
    gain_norm: Annotated[
        Norm, typer.Option(help="How a head's attention to the prompt is compared.")
    ] = Norm.minmax,
    steps: Steps = None,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale.")] = 30.0,
    seed: Seed = 0,
    width: Annotated[int | None, typer.Option(help="Of a panel, pixels; a multiple of 16.")] = None,
    height: Annotated[int | None, typer.Option(help="Of a panel, pixels; a multiple of 16.")] = None,
    padding_mask_crop: Annotated[
        int | None, typer.Option(min=0, help="Show the model the hole and this many pixels around it.")
    ] = None,
    subject_fill: Annotated[
        float | None, typer.Option(help="Share of its panel that the subject takes. Default: 0.9.")
    ] = None,
    blend: Annotated[
        bool, typer.Option(help="Put what is outside of the mask back after every step.")
    ] = True,
    dtype: Precision = Dtype.bfloat16,
    device: Device = None,
    offload: Offload = False,
    backend: Backend = "auto",
    paste_back: Annotated[bool, typer.Option(help="Keep the photo's own pixels outside of the mask.")] = True,
    report: Annotated[
        Path | None, typer.Option(help="Also write a figure: diptych, mask, result, head gains.")
    ] = None,
) -> None:
    """Insert the subject of one photo into the hole of another (In-Context Brush)."""
    from ..methods import InContextBrush
    from ..pipelines import images as im

    read = {"subject": subject, "image": image, "mask": mask, "subject_mask": subject_mask}
    check_pictures({"output": output, "report": report}, read=read)
    if report is not None:
        check_packages("--report", "matplotlib")
    method = InContextBrush(alpha_prompt, alpha_subject, gain_span, gain_norm=gain_norm.value)
    # Wrong input is refused before a model is loaded, which takes minutes.
    photo = im.open_image(image, "image")
    hole = im.open_mask(mask, photo.size)
    picture = im.open_image(subject, "subject")
    if subject_mask is not None:
        im.open_mask(subject_mask, picture.size, "subject_mask", "subject")
    if subject_mask is not None and subject_name is not None:
        raise ValueError("subject_mask: expected it or subject_name, got both")
    given = {
        "width": width,
        "height": height,
        "padding_mask_crop": padding_mask_crop,
        "subject_fill": subject_fill,
        "steps": steps,
    }
    model, shape = or_tiny(model, hole, given)
    pipe = load("InContextBrushPipeline", model, dtype, device, offload, backend)
    result = pipe(
        prompt,
        subject=subject,
        image=image,
        mask=mask,
        subject_mask=subject_mask,
        subject_name=subject_name,
        method=method,
        guidance_scale=guidance,
        seed=seed,
        blend=blend,
        paste_back=paste_back,
        **shape,
    )
    seen = result.diptychs[0].width, result.diptychs[0].height // 2
    if seen != photo.size:
        what = (
            "the hole's surroundings"
            if "padding_mask_crop" in shape
            else f"{image}, {im.size_text(photo.size)} pixels,"
        )
        print(f"the model saw {what} at {im.size_text(seen)} pixels")
    _write(result, output, report, prompt)


def _write(result: InContextBrushOutput, output: Path, report: Path | None, title: str) -> None:
    from .shared.figures import insertion_report

    pictures: dict[Path, Any] = {output: lambda path: result.images[0].save(path, quality=95)}
    if report is not None:
        pictures[report] = lambda path: insertion_report(result, title=title).savefig(path, dpi=110)
    write_pictures(pictures)
    print(f"the picture is {output}" + (f", its report {report}" if report is not None else ""))

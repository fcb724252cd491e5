"""The command line: flashbrush insert, edit, inspect, vicl, eval, sweep, demo, info, bench.

Wrong input gives one line on standard error and exit code 2, and nothing is written.
"""

from __future__ import annotations

import platform
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from tqdm import tqdm

from .edit import edit
from .evaluate import eval_app
from .evaluate_insertion import eval_insert, sweep
from .inspect import inspect
from .model import Backend, Device, Dtype, Offload, Out, Precision, Seed, Steps, load, or_tiny, quiet
from .output import check_folder, check_packages, check_pictures, print_table, write_pictures
from .vicl import vicl

if TYPE_CHECKING:
    from ..pipelines import InContextBrushOutput

app = typer.Typer(
    name="flashbrush",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Segment-controlled attention for in-context image editing.",
)


class Norm(StrEnum):
    minmax = "minmax"
    mean = "mean"
    max = "max"
    softmax = "softmax"


PACKAGES = {
    "flashbrush": "",
    "torch": "all",
    "triton": "the triton backend",
    "diffusers": "apply(), insert, edit, inspect, vicl, demo",
    "transformers": "insert, vicl, demo",
    "accelerate": "--offload, quick loading",
    "safetensors": "insert, vicl, demo",
    "numpy": "insert, vicl, demo",
    "Pillow": "insert, vicl, demo",
    "matplotlib": "insert --report, inspect, eval insert, sweep, demo",
    "scikit-image": "the photos of demo, eval insert and sweep",
    "torchmetrics": "eval",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends with SystemExit."""
    command = typer.main.get_command(app)
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            code = command.main(given, "flashbrush", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if (message := _explain(error)) is None:
            raise
        # Libraries below write pages into an error.
        line = textwrap.shorten(message, 500, placeholder=" ...") or type(error).__name__
        print(f"flashbrush: {line}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(usual: Callable[..., None], message: Warning | str, *place: Any) -> None:
    """Ours in one line, without the place in the code."""
    if str(message).startswith("flashbrush: "):
        print(message, file=sys.stderr)
    else:
        usual(message, *place)


def _explain(error: Exception) -> str | None:
    """What to tell the user; None for an error that is ours."""
    if hasattr(error, "format_message"):  # of the command line itself
        return error.format_message()  # type: ignore[attr-defined]
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory is full: try --offload, or a smaller --width and --height"
    expected = (ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError)
    return str(error) if isinstance(error, expected) else None


@app.command()
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
    gain_span: Annotated[float, typer.Option(help="Heads gain from 1 to 1 + this.")] = 0.2,
    gain_norm: Annotated[
        Norm, typer.Option(help="How a head's attention to the prompt is compared.")
    ] = Norm.minmax,
    steps: Steps = None,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale.")] = 30.0,
    seed: Seed = 0,
    width: Annotated[int | None, typer.Option(help="Of a panel, pixels; a multiple of 16.")] = None,
    height: Annotated[int | None, typer.Option(help="Of a panel, pixels; a multiple of 16.")] = None,
    padding_mask_crop: Annotated[
        int | None, typer.Option(min=0, help="Show the model the hole and so many pixels more.")
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
    # Before a model is loaded, which takes minutes.
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
            else f"{image}, {_times(photo.size)} pixels,"
        )
        print(f"the model saw {what} at {_times(seen)} pixels")
    _finish(result, output, report, prompt)


app.command()(edit)
app.command()(inspect)
app.command()(vicl)
app.command()(sweep)
eval_app.command("insert")(eval_insert)
app.add_typer(eval_app)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("demo"),
    steps: Steps = None,
    seed: Seed = 0,
) -> None:
    """Insert scikit-image's cat and others into scenes, with the tiny model that comes with the package."""
    from ... import tiny_fill as tiny_folder
    from ...bindings import backends
    from ..evaluation.insertion.items import LIST, write_items
    from ..pipelines import InContextBrushPipeline
    from ..tiny_fill import options as tiny_fill
    from .demo_items import items
    from .report import insertion_grid

    check_folder("output", output)
    if output.exists() and any(output.iterdir()) and not (output / "photos" / LIST).is_file():
        raise ValueError(
            f"output: expected a new folder, or that of another demo: {output} holds other files"
        )
    asked = items()
    quiet()
    pipe = InContextBrushPipeline.from_pretrained(tiny_folder(), dtype=torch.float32)
    write_items(asked, output / "photos")
    made, seconds = [], []
    for item in tqdm(asked, "inserting"):
        options: dict[str, Any] = tiny_fill.options(item.mask) | ({} if steps is None else {"steps": steps})
        started = time.perf_counter()
        made.append(
            pipe(
                item.prompt,
                subject=item.subject,
                subject_mask=item.subject_mask,
                image=item.image,
                mask=item.mask,
                seed=seed,
                progress=False,
                **options,
            )
        )
        seconds.append(time.perf_counter() - started)
    pictures: dict[Path, Any] = {
        output / f"{item.name}.png": result.images[0].save for item, result in zip(asked, made, strict=True)
    }
    report = output / "report.png"
    title = "Subjects into scenes, by the tiny model that comes with flashbrush: it sees 64 x 64 pixels around the hole"
    grid = insertion_grid(list(zip(asked, made, strict=True)), title)
    pictures[report] = lambda path: grid.savefig(path, dpi=110)
    write_pictures(pictures)
    backend = next(
        name for name, reasons in backends().items() if name in ("cpu", "composed") and not reasons
    )
    print(f"{statistics.median(seconds):.2f} seconds for an insertion, attention by the {backend} backend")
    print(f"the pictures are in {output}, all of them in {report}")


@app.command()
def info() -> None:
    """What is usable here, and why the rest is not: backends, versions, devices."""
    from importlib.metadata import PackageNotFoundError, version

    from ...bindings import backends
    from ...bindings.backends.cpu import attention as cpu

    usable = [(name, "no" if reasons else "yes", "\n".join(reasons)) for name, reasons in backends().items()]
    print_table(("backend", "usable", "why not"), usable, "Backends")
    versions = [("Python", platform.python_version(), "")]
    for name, use in PACKAGES.items():
        try:
            versions.append((name, version(name), use))
        except PackageNotFoundError:
            versions.append((name, "not installed", use))
    print_table(("package", "version", "for"), versions, "Versions")
    unproven = " (not yet run on hardware: only with FLASHBRUSH_CPU_ISA={0})"
    names = [isa + unproven.format(isa) * (isa in cpu.BY_NAME_ONLY) for isa in cpu.isas()]
    sets = f"; built and usable: {', '.join(names)}" if names else ""
    devices = [("cpu", f"{torch.get_num_threads()} threads; {torch.backends.cpu.get_cpu_capability()}{sets}")]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"))
    if not torch.cuda.device_count():
        built = torch.version.cuda or torch.version.hip
        devices.append(
            ("cuda", "none: " + ("torch sees no GPU" if built else "torch was built without CUDA"))
        )
    print_table(("device", "what"), devices, "Devices")


def _finish(result: InContextBrushOutput, output: Path, report: Path | None, title: str) -> None:
    from .report import insertion_report

    pictures: dict[Path, Any] = {output: lambda path: result.images[0].save(path, quality=95)}
    if report is not None:
        pictures[report] = lambda path: insertion_report(result, title=title).savefig(path, dpi=110)
    write_pictures(pictures)
    print(f"the picture is {output}" + (f", its report {report}" if report is not None else ""))


def _times(size: Any) -> str:
    return f"{size[0]}x{size[1]}"

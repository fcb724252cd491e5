"""flashbrush demo: insert photographed and drawn subjects into scenes with the tiny model."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from .shared.loading import quiet
from .shared.options import Seed, Steps
from .shared.output import check_folder, write_pictures


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("demo"),
    steps: Steps = None,
    seed: Seed = 0,
) -> None:
    """Insert scikit-image's cat and others into scenes, with the tiny model that comes with the package."""
    from ... import tiny_fill as tiny_folder
    from ...bindings import backends
    from ..evaluation.insertion.items import write_items
    from ..pipelines import InContextBrushPipeline
    from ..tiny_fill import options as tiny_fill
    from .demo_items import items
    from .shared.figures import insertion_grid

    check_demo_folder(output)
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
    title = (
        "Subjects into scenes, by the tiny model that comes with flashbrush: "
        "it sees 64 x 64 pixels around the hole"
    )
    grid = insertion_grid(list(zip(asked, made, strict=True)), title)
    pictures[report] = lambda path: grid.savefig(path, dpi=110)
    write_pictures(pictures)
    backend = next(
        name for name, reasons in backends().items() if name in ("cpu", "composed") and not reasons
    )
    print(f"{statistics.median(seconds):.2f} seconds for an insertion, attention by the {backend} backend")
    print(f"the pictures are in {output}, all of them in {report}")


def check_demo_folder(output: Path) -> None:
    """Raise ValueError unless `output` is new, empty, or the folder of an earlier demo."""
    from ..evaluation.insertion.items import LIST

    check_folder("output", output)
    if output.exists() and any(output.iterdir()) and not (output / "photos" / LIST).is_file():
        raise ValueError(
            f"output: expected a new folder, or that of another demo: {output} holds other files"
        )

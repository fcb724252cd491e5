"""What `eval insert` and `sweep` share: options, the pipeline, and the file of conditions."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...evaluation import machine
from .loading import load
from .options import Dtype
from .output import print_table

if TYPE_CHECKING:
    from ...evaluation.insertion.evaluate import Options
    from ...evaluation.insertion.items import Item

Folder = Annotated[
    Path | None,
    typer.Argument(help="Folder with items.csv. Default: synthetic items held out from the training."),
]
Results = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for tables and figure; made where it is not there.")
]
Model = Annotated[
    str | None, typer.Option(help="FLUX.1-Fill: a Hugging Face name or a folder. Default: the tiny one.")
]
Count = Annotated[int, typer.Option(min=2, help="Synthetic items of each sort.")]
Freedom = Annotated[
    float, typer.Option(min=0, max=1, help="Synthetic items: how much the pose differs from the subject's.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Seeds of an item.")]
Batch = Annotated[int, typer.Option(min=1, help="Items of one call.")]


def load_pipeline(
    model: str | None,
    made: bool,
    steps: int | None,
    dtype: Dtype,
    device: str | None,
    offload: bool,
    backend: str,
) -> tuple[Any, Options]:
    """The pipeline, and a function from an item to the options of its call.

    Args:
        model: as given; None: the tiny model.
        made: whether the items are synthetic, with photos that are panels of the tiny model's size.
        steps: as given; None: the model's default.
        dtype: as in loading.load.
        device: as in loading.load.
        offload: as in loading.load.
        backend: as in loading.load.
    """
    from .... import tiny_fill as tiny_folder
    from ...tiny_fill import options as tiny_fill

    pipe = load("InContextBrushPipeline", model or str(tiny_folder()), dtype, device, offload, backend)
    more = {} if steps is None else {"steps": steps}

    def options(item: Item) -> dict[str, Any]:
        if made:  # the photo is a panel already
            return {"width": tiny_fill.SIDE, "height": tiny_fill.SIDE, "steps": tiny_fill.STEPS} | more
        return more if model else tiny_fill.options(item.mask) | more

    return pipe, options


def write_conditions(
    output: Path, context: typer.Context, pipe: Any, options: Options, sorts: Mapping[str, Sequence[Item]]
) -> None:
    """Write conditions.json: the machine, and every option as given or by default, without folders of paths.

    Args:
        output: folder for the file.
        context: of the command, with its options.
        pipe: the pipeline.
        options: of its call, by item.
        sorts: the items by sort.
    """
    from .... import tiny_fill as tiny_folder

    given = {name: value for name, value in context.params.items() if name not in ("output", "count")}
    if given["folder"] is not None:
        del given["freedom"]
    given["model"] = given["model"] or str(tiny_folder())
    for name in ("folder", "model", "dino", "clip"):
        if given.get(name) is not None and Path(given[name]).exists():
            given[name] = Path(given[name]).resolve().name
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(pipe.__call__).parameters.items()
    }
    call = defaults | options(next(iter(sorts.values()))[0])
    device = pipe.pipe._execution_device
    about = machine.describe() | {name: version(name) for name in ("diffusers", "transformers")}
    if device.type == "cuda":
        import torch

        about["gpu"] = torch.cuda.get_device_name(device)
    conditions = given | {
        "device": str(device),
        "steps": call["steps"],
        "guidance": call["guidance_scale"],
        "items": {sort or "all": len(items) for sort, items in sorts.items()},
    }
    text = json.dumps({"machine": about, "conditions": conditions}, indent=1, default=str)
    (output / "conditions.json").write_text(text + "\n")


def print_rows(rows: Sequence[Mapping[str, str]], title: str) -> None:
    """Print rows as a table, whose columns are the keys of the first."""
    print_table(list(rows[0]), (list(row.values()) for row in rows), title, width=140)

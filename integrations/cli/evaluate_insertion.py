"""flashbrush eval insert, and flashbrush sweep: insertions by the hundred, measured."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..evaluation import machine
from .model import Backend, Device, Dtype, Offload, Precision, Seed, Steps, load
from .output import check_folder, check_packages, print_table, write_pictures

if TYPE_CHECKING:
    from ..evaluation.insertion.evaluate import Options, Outcome
    from ..evaluation.insertion.items import Item

Folder = Annotated[
    Path | None, typer.Argument(help="With items.csv. Default: made items that the tiny model never saw.")
]
Results = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for tables and figure; made where it is not there.")
]
Model = Annotated[
    str | None, typer.Option(help="FLUX.1-Fill: a Hugging Face name or a folder. Default: the tiny one.")
]
Count = Annotated[int, typer.Option(min=2, help="Made items of each sort.")]
Freedom = Annotated[
    float, typer.Option(min=0, max=1, help="Made items: how far the pose is off that of the subject.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Seeds of an item.")]
Batch = Annotated[int, typer.Option(min=1, help="Items of one call.")]
Judge = Annotated[str | None, typer.Option(help="A judge: a Hugging Face name or a folder.")]


def eval_insert(
    context: typer.Context,
    output: Results,
    folder: Folder = None,
    model: Model = None,
    alpha_prompt: Annotated[float, typer.Option(help="As of insert.")] = 0.0,
    alpha_subject: Annotated[float, typer.Option(help="As of insert.")] = 0.0,
    gain_span: Annotated[float, typer.Option(help="As of insert.")] = 0.0,
    hole_only: Annotated[bool, typer.Option(help="Only the hole's tokens read more.")] = False,
    blend: Annotated[bool, typer.Option(help="As of insert.")] = True,
    count: Count = 96,
    freedom: Freedom = 0.0,
    repeats: Repeats = 1,
    batch: Batch = 16,
    steps: Steps = None,
    seed: Seed = 0,
    dino: Judge = None,
    clip: Judge = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    offload: Offload = False,
    backend: Backend = "auto",
) -> None:
    """How well subjects are inserted: identity, agreement with the prompt, PSNR, FID; as tables, CSV and a
    figure.

    Made items are done with their own subject as the reference, with none, with another one's, and with a
    prompt that contradicts it.
    """
    from ..evaluation.insertion.evaluate import Setting, evaluate
    from ..evaluation.insertion.items import held_out, read_items
    from ..evaluation.insertion.judges import MEASURES, LatentStatistics, Models, frechet_distance
    from ..evaluation.summary import estimate, write_csv
    from .report import outcome_grid

    check_folder("output", output)
    check_packages("eval insert", "matplotlib", "torchmetrics")
    setting = Setting(alpha_prompt, alpha_subject, gain_span, hole_only, blend)
    if folder is not None:
        sorts = {"": read_items(folder)}
    else:
        sorts = {
            f"{reference} reference": held_out(count, reference=reference, freedom=freedom)
            for reference in ("own", "blank", "stranger")
        } | {"contradiction": held_out(count, kind="contradiction", freedom=freedom)}
    pipe, options = _pipeline(model, folder is None, steps, dtype, device, offload, backend)
    models = Models(dino, clip, device=pipe.pipe._execution_device) if dino or clip else None
    rows, shown, cells = [], [], {}
    for sort, items in sorts.items():
        outcomes = evaluate(
            pipe,
            items,
            [setting],
            options=options,
            seed=seed,
            repeats=repeats,
            batch=batch,
            paste_back=folder is not None,
            models=models,
        )
        shown = shown or outcomes
        rows += [{"sort": sort, **outcome.row()} for outcome in outcomes]
        for name in (*MEASURES, "fid"):
            if name == "fid":
                found, real = (
                    [o.picture for o in outcomes],
                    [o.item.truth for o in outcomes if o.item.truth is not None],
                )
                if len(real) == len(found) > 1 and len({picture.size for picture in (*found, *real)}) == 1:
                    features = LatentStatistics(pipe.pipe.vae, pipe.pipe._execution_device)
                    cells[name, sort] = f"{frechet_distance(features, found, real):.4f}"
            elif (measured := estimate(outcomes, name)).items:
                cells[name, sort] = f"{measured.mean:.3f} ± {measured.error:.3f} ({measured.items})"
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "items.csv", rows)
    names = list(dict.fromkeys(name for name, _ in cells))
    table = [{"measure": name, **{sort: cells.get((name, sort), "") for sort in sorts}} for name in names]
    write_csv(output / "table.csv", table)
    _write_conditions(output, context, pipe, options, sorts)
    figure = outcome_grid(shown[:8])
    write_pictures({output / "pictures.png": lambda path: figure.savefig(path, dpi=110)})
    _print(
        table,
        "Mean, standard error and number of items" + (f"; {repeats} seeds of each" if repeats > 1 else ""),
    )
    meanings = MEASURES | {"fid": "between the autoencoder's channel statistics of results and truths"}
    for name in names:
        print(f"{name}: {meanings[name]}")
    print(f"the tables and pictures are in {output}")


def sweep(
    context: typer.Context,
    output: Results,
    folder: Folder = None,
    axis: Annotated[
        list[str] | None, typer.Option(help="A knob and its values, as alpha_subject=0,0.3; several.")
    ] = None,
    model: Model = None,
    count: Count = 96,
    freedom: Freedom = 0.0,
    repeats: Repeats = 1,
    batch: Batch = 16,
    steps: Steps = None,
    seed: Seed = 0,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    offload: Offload = False,
    backend: Backend = "auto",
) -> None:
    """What each knob changes, one at a time, from the same seeds: means, standard errors and a plot."""
    from ..evaluation.insertion.evaluate import evaluate
    from ..evaluation.insertion.items import held_out, read_items
    from ..evaluation.insertion.sweep import AXES, MORE, parse_axis, plot, settings, table
    from ..evaluation.summary import write_csv

    check_folder("output", output)
    check_packages("sweep", "matplotlib")
    named = settings(dict(map(parse_axis, axis)), {}) if axis else settings(AXES, MORE)
    if folder is not None:
        sorts = {"": read_items(folder)}
    else:
        sorts = {kind: held_out(count, kind=kind, freedom=freedom) for kind in ("reference", "contradiction")}
    items = [item for some in sorts.values() for item in some]
    pipe, options = _pipeline(model, folder is None, steps, dtype, device, offload, backend)
    outcomes: list[Outcome] = evaluate(
        pipe,
        items,
        list(dict.fromkeys(named.values())),
        options=options,
        seed=seed,
        repeats=repeats,
        batch=batch,
        paste_back=folder is not None,
    )
    rows = table(outcomes, named)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "items.csv", [outcome.row() for outcome in outcomes])
    write_csv(output / "sweep.csv", rows)
    _write_conditions(output, context, pipe, options, sorts)
    title = f"change against the stock model, {len(items)} items, {repeats} seed{'s' * (repeats > 1)} of each"
    figure = plot(rows, title)
    write_pictures({output / "sweep.png": lambda path: figure.savefig(path, dpi=110)})
    shown = [
        {
            "axis": row["axis"],
            "value": row["value"],
            "items": row["items"],
            "measure": row["measure"],
            "mean": f"{row['mean']:.3f} ± {row['error']:.3f}",
            "change": ""
            if row["axis"] == "base"
            else f"{row['difference']:+.3f} ± {row['difference_error']:.3f}",
        }
        for row in rows
    ]
    _print(shown, "Mean and standard error; change against the stock model, paired by item and seed")
    print(f"the tables and the plot are in {output}")


def _pipeline(
    model: str | None,
    made: bool,
    steps: int | None,
    dtype: Dtype,
    device: str | None,
    offload: bool,
    backend: str,
) -> tuple[Any, Options]:
    """The pipeline, and the options of its call for an item."""
    from ... import tiny_fill as tiny_folder
    from ..tiny_fill import options as tiny_fill

    pipe = load("InContextBrushPipeline", model or str(tiny_folder()), dtype, device, offload, backend)
    more = {} if steps is None else {"steps": steps}

    def options(item: Item) -> dict[str, Any]:
        if made:  # the photo is a panel already
            return {"width": tiny_fill.SIDE, "height": tiny_fill.SIDE, "steps": tiny_fill.STEPS} | more
        return more if model else tiny_fill.options(item.mask) | more

    return pipe, options


def _write_conditions(
    output: Path, context: typer.Context, pipe: Any, options: Options, sorts: Mapping[str, Sequence[Item]]
) -> None:
    """conditions.json: the machine, and all that the command was given or took by default; of a path its last
    name.
    """
    from ... import tiny_fill as tiny_folder

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


def _print(rows: Sequence[Mapping[str, str]], title: str) -> None:
    print_table(list(rows[0]), (list(row.values()) for row in rows), title, width=140)

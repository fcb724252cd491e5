"""flashbrush sweep: measure the effect of each knob of In-Context Brush on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .shared.insertion_evaluation import (
    Batch,
    Count,
    Folder,
    Freedom,
    Model,
    Repeats,
    Results,
    load_pipeline,
    print_rows,
    write_conditions,
)
from .shared.options import Backend, Device, Dtype, Offload, Precision, Seed, Steps
from .shared.output import check_folder, check_packages, write_pictures

if TYPE_CHECKING:
    from ..evaluation.insertion.evaluate import Outcome


def sweep(
    context: typer.Context,
    output: Results,
    folder: Folder = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(help="A knob and its values, as alpha_subject=0,0.3. Repeat it for more."),
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
    from ..evaluation.csv_files import write_csv
    from ..evaluation.insertion.evaluate import evaluate
    from ..evaluation.insertion.items import held_out, read_items
    from ..evaluation.insertion.sweep import AXES, MORE, parse_axis, plot, settings, table

    check_folder("output", output)
    check_packages("sweep", "matplotlib")
    named = settings(dict(map(parse_axis, axis)), {}) if axis else settings(AXES, MORE)
    if folder is not None:
        sorts = {"": read_items(folder)}
    else:
        sorts = {kind: held_out(count, kind=kind, freedom=freedom) for kind in ("reference", "contradiction")}
    items = [item for some in sorts.values() for item in some]
    pipe, options = load_pipeline(model, folder is None, steps, dtype, device, offload, backend)
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
    write_conditions(output, context, pipe, options, sorts)
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
    print_rows(shown, "Mean and standard error; change against the stock model, paired by item and seed")
    print(f"the tables and the plot are in {output}")

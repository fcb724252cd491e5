"""flashbrush eval insert: measure subject insertion over synthetic items or a folder of photos."""

from __future__ import annotations

from typing import Annotated

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

Judge = Annotated[str | None, typer.Option(help="A judge: a Hugging Face name or a folder.")]


def eval_insert(
    context: typer.Context,
    output: Results,
    folder: Folder = None,
    model: Model = None,
    alpha_prompt: Annotated[float, typer.Option(help="As in insert.")] = 0.0,
    alpha_subject: Annotated[float, typer.Option(help="As in insert.")] = 0.0,
    gain_span: Annotated[float, typer.Option(help="As in insert.")] = 0.0,
    hole_only: Annotated[bool, typer.Option(help="Only the hole's tokens read more.")] = False,
    blend: Annotated[bool, typer.Option(help="As in insert.")] = True,
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
    """Measure how well subjects are inserted; writes tables, CSV files and a figure.

    Measures identity, agreement with the prompt, PSNR and FID. Synthetic items are inserted with their own
    subject as the reference, with a blank, with another item's subject, and with a prompt that contradicts
    the reference.
    """
    from ..evaluation.csv_files import write_csv
    from ..evaluation.frechet import LatentStatistics, frechet_distance
    from ..evaluation.insertion.evaluate import Setting, evaluate
    from ..evaluation.insertion.items import held_out, read_items
    from ..evaluation.insertion.judges import MEASURES, Models
    from ..evaluation.insertion.summary import estimate
    from .shared.figures import outcome_grid

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
    pipe, options = load_pipeline(model, folder is None, steps, dtype, device, offload, backend)
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
    write_conditions(output, context, pipe, options, sorts)
    figure = outcome_grid(shown[:8])
    write_pictures({output / "pictures.png": lambda path: figure.savefig(path, dpi=110)})
    print_rows(
        table,
        "Mean, standard error and number of items" + (f"; {repeats} seeds of each" if repeats > 1 else ""),
    )
    meanings = MEASURES | {"fid": "between the autoencoder's channel statistics of results and truths"}
    for name in names:
        print(f"{name}: {meanings[name]}")
    print(f"the tables and pictures are in {output}")

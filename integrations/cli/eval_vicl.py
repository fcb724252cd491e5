"""flashbrush eval vicl: measure visual in-context learning over a folder of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared.loading import load
from .shared.options import Backend, Device, Dtype, Offload, Precision, Seed, Width
from .shared.output import check_folder, check_packages, check_pictures, print_table, write_pictures
from .shared.visual_icl_options import (
    Adain,
    Cache,
    Clip,
    Contrast,
    Gamma,
    Levels,
    Model,
    Skip,
    Task,
    Temperature,
    UseCache,
    check_cache,
    options,
)

if TYPE_CHECKING:
    from PIL import Image

    from ..evaluation.visual_icl.items import Pair
    from ..pipelines import VisualICLPipeline

ALL = "(all)"  # name of the last row; no file has it


def eval_vicl(
    folder: Annotated[
        Path, typer.Argument(help="Folder with pairs.csv: name, image, truth, prompts (names).")
    ],
    task: Task,
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="CSV file to write: a row per prediction, and one for all.")
    ],
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for the predictions; made where it is not there.")
    ] = None,
    reach: Annotated[
        float, typer.Option(help="Keypoints: how far off a correct one may be; 1: the longer side.")
    ] = 0.1,
    features: Annotated[
        str, typer.Option(help="Colourisation: latents, the model's own, or inception, for FID.")
    ] = "latents",
    lpips: Annotated[
        str | None, typer.Option(help="Colourisation: alex, vgg or squeeze; needs torchvision.")
    ] = None,
    steps: Levels = 70,
    skip: Skip = None,
    gamma: Gamma = 3.5,
    temperature: Temperature = 0.4,
    contrast: Contrast = 1.67,
    clip: Clip = True,
    adain: Adain = True,
    seed: Seed = 0,
    width: Width = None,
    height: Width = None,
    cache: Cache = None,
    use_cache: UseCache = True,
    dtype: Precision = Dtype.bfloat16,
    device: Device = None,
    offload: Offload = False,
    backend: Backend = "auto",
) -> None:
    """Visual in-context learning (SD-VICL), by the metric of its paper for the task.

    FOLDER/pairs.csv lists photos and their ground truths: columns name, image and truth (files in FOLDER),
    and prompts, the names of the rows from which a row is predicted; rows without any are only prompts. mIoU
    judges segmentation, detection and semantic; MSE and PCK keypoints; MSE edges; FID and LPIPS
    colourisation.
    """
    check_packages("eval", "torchmetrics")
    from ..evaluation.frechet import LatentStatistics
    from ..evaluation.visual_icl.items import read_pairs
    from ..evaluation.visual_icl.judges import TaskJudge
    from ..pipelines.shared.visual_icl_tasks import check_palette, check_task, palette_of
    from ..pipelines.visual_icl import NEEDS_PALETTE

    check_task(task)
    check_pictures({"output": output}, (".csv",))
    check_folder("pictures", pictures)
    check_cache(cache)
    knobs = options(steps, skip, gamma, temperature, contrast, clip, adain, seed, width, height, use_cache)
    pairs = {pair.name: pair for pair in read_pairs(folder)}
    queries = [pair for pair in pairs.values() if pair.prompts]
    _check_sizes(pairs, queries, resized=width is not None or height is not None)
    palette = (
        check_palette(palette_of([pair.truth for pair in pairs.values()])) if task in NEEDS_PALETTE else None
    )
    if features not in ("latents", "inception"):
        raise ValueError(f"features: expected latents or inception, got {features!r}")
    if task == "colourisation" and len(queries) < 2:
        raise ValueError(
            "folder: colourisation is judged by a distance between at least two predictions and their truths"
        )
    judge = TaskJudge(task, palette=palette, reach=reach, lpips=lpips, features=features)

    pipe: VisualICLPipeline = load("VisualICLPipeline", model, dtype, device, offload, backend, cache=cache)
    if features == "latents":
        judge.features = LatentStatistics(pipe.pipe.vae, pipe.pipe._execution_device)
    rows, painted, reused = [], {}, 0
    for pair in _bar(queries):
        prompts = [(pairs[name].image, pairs[name].truth) for name in pair.prompts]
        result = pipe(prompts, pair.image, task=task, palette=palette, progress=False, **knobs)
        rows.append({"name": pair.name, **judge.update(result.data, pair.truth)})
        painted[pair.name] = result.picture
        reused += result.reused
    rows.append({"name": ALL, **judge.summary()})
    if use_cache:
        total = sum(2 * len(pair.prompts) + 1 for pair in queries)
        print(f"{reused} of {total} inversions were there already, in {pipe.cache.folder}")
    _show(rows[-1], f"{task}, {len(queries)} predictions")
    _write(rows, output, painted, pictures)
    print(
        f"the results are {output}" + (f", the predictions are in {pictures}" if pictures is not None else "")
    )


def _check_sizes(pairs: dict[str, Pair], queries: Sequence[Pair], resized: bool) -> None:
    """Raise ValueError where a query and its prompts differ in size and are not resized to one."""
    for query in queries:
        for prompt in (pairs[name] for name in query.prompts):
            if prompt.image.size != query.image.size and not resized:
                raise ValueError(
                    f"folder: {prompt.name} has another size than {query.name}, {prompt.image.size} and "
                    f"{query.image.size} pixels; give --width and --height to resize all to one"
                )


def _bar(queries: Sequence[Pair]) -> Any:
    from tqdm.auto import tqdm

    return tqdm(queries, desc="predicting")


def _show(row: dict[str, Any], title: str) -> None:
    from ..evaluation.visual_icl.judges import HIGHER_IS_BETTER, MEASURES

    rows = [
        (name, f"{value:.4f}", "higher" if name in HIGHER_IS_BETTER else "lower", MEASURES[name])
        for name, value in row.items()
        if name != "name"
    ]
    print_table(("measure", "value", "better", "what"), rows, title)


def _write(
    rows: Sequence[dict[str, Any]], output: Path, painted: dict[str, Image.Image], folder: Path | None
) -> None:
    """Write the table and the predictions' pictures: all files or none."""
    from ..evaluation.csv_files import write_csv

    files: dict[Path, Any] = {output: lambda path: write_csv(path, rows)}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        files |= {folder / f"{name}.png": picture.save for name, picture in painted.items()}
    write_pictures(files)

"""Train the tiny FLUX.1-Fill: python -m flashbrush.integrations.tiny_fill.training.train FOLDER

Run again, the command continues from its last state. It writes FOLDER/state.pt, the whole state;
FOLDER/log.csv, measures during training; and FOLDER/checkpoint, the model for
FluxFillPipeline.from_pretrained. The transformer is trained first, then the decoder. On a GPU the data is
made there as well.
"""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from ...diffusers import apply
from .sampling import judge
from .state import Recipe, Training


def main(
    folder: Path,
    steps: Annotated[int, typer.Option(help="Of the transformer, in all.")] = Recipe.steps,
    decoder_steps: Annotated[int, typer.Option(help="Of the decoder, in all.")] = Recipe.decoder_steps,
    batch: int = Recipe.batch,
    rate: float = Recipe.rate,
    widen: float = Recipe.widen,
    decay: float = Recipe.decay,
    aligned: Annotated[
        float, typer.Option(help="Share of the diptychs with the same pose in both panels.")
    ] = Recipe.aligned,
    seed: int = Recipe.seed,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    minutes: Annotated[
        float, typer.Option(help="Stop after this many minutes; run the command again to continue.")
    ] = math.inf,
    every: Annotated[int, typer.Option(help="Steps between two saved states.")] = 500,
) -> None:
    """Train, or continue a run."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        seed=seed,
        steps=steps,
        decoder_steps=decoder_steps,
        batch=batch,
        rate=rate,
        widen=widen,
        decay=decay,
        aligned=aligned,
    )
    training, state, start = Training(recipe, device), folder / "state.pt", time.monotonic()
    if state.exists():
        training.load(state)
    with apply(training.transformer):
        for part, end in (("transformer", steps), ("decoder", decoder_steps)):
            losses: list[float] = []
            for done in (
                bar := tqdm(range(training.done[part], end), part, end, initial=training.done[part])
            ):
                losses.append(training.step(part))
                last = done + 1 == end or time.monotonic() - start > 60 * minutes
                if (done + 1) % every == 0 or last:
                    training.save(state)
                    measured = judge(training) if part == "transformer" else {}
                    row = {"part": part, "step": done + 1, "loss": sum(losses) / len(losses), **measured}
                    _log(folder / "log.csv", row)
                    bar.set_postfix(
                        {name: f"{value:.3g}" for name, value in row.items() if isinstance(value, float)}
                    )
                    losses.clear()
                if last:
                    break
            if time.monotonic() - start > 60 * minutes:
                break
    training.write_checkpoint(folder / "checkpoint")
    print(f"the checkpoint is {folder / 'checkpoint'}")


def _log(path: Path, row: dict[str, Any]) -> None:
    fresh = not path.exists()
    names = ["part", "step", "loss", "psnr 0", "pattern 0", "psnr 1", "pattern 1"]
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        if fresh:
            writer.writeheader()
        writer.writerow(
            {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()}
        )


if __name__ == "__main__":
    typer.run(main)

"""Items of subject insertion: photos in a folder with a list, or synthetic items whose truth is known."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ...pipelines import images as im
from ...tiny_fill.data.canvases import SIDE, canvases
from ...tiny_fill.data.photos import HELD_OUT, photos
from ...tiny_fill.data.subjects import PHOTO
from ...tiny_fill.data.words import COLOURS
from ..csv_files import read_list

LIST = "items.csv"
PICTURES = ("subject", "image", "mask", "subject_mask", "truth", "coverage")
NEEDED = ("name", "prompt", "subject", "image", "mask")


@dataclass(frozen=True)
class Item:
    """One insertion.

    Attributes:
        name: unique within a set.
        prompt: what the result shows.
        subject: photo of the subject.
        image: photo to insert into.
        mask: of image's size, white where to paint.
        subject_mask: of subject's size, white on the subject; None: its transparency, or all of it.
        truth: the correct result, of image's size; None: unknown.
        coverage: white where the truth shows the subject, of image's size; None: unknown.
        colour: name of the main colour that the prompt asks for; "" where it names none.
    """

    name: str
    prompt: str
    subject: Image.Image
    image: Image.Image
    mask: Image.Image
    subject_mask: Image.Image | None = None
    truth: Image.Image | None = None
    coverage: Image.Image | None = None
    colour: str = ""


def read_items(folder: Path) -> list[Item]:
    """Read the items that `folder`/items.csv lists.

    Its columns are name, prompt, subject, image, mask and, where known, subject_mask, truth, coverage and
    colour; pictures are files relative to the folder.

    Raises:
        FileNotFoundError: the list or one of its files is missing.
        ValueError: a column is missing, a name appears twice, sizes do not match, or a file is not a picture.
    """
    path = Path(folder) / LIST
    return [_read(path, row) for row in read_list(path, "items", NEEDED)]


def _read(path: Path, row: dict[str, str]) -> Item:
    def picture(column: str, of: str) -> Image.Image | None:
        if not row.get(column):
            return None
        file, name = path.parent / row[column], f"{column} of {row['name']}"
        if column in ("mask", "subject_mask", "coverage"):
            return im.open_mask(file, opened[of].size, name, f"{of} of {row['name']}")
        return im.open_image(file, name)

    opened: dict[str, Image.Image] = {}
    for column, of in zip(PICTURES, ("", "", "image", "subject", "", "image"), strict=True):
        found = picture(column, of)
        if found is not None:
            opened[column] = found
        elif column in NEEDED:
            raise ValueError(f"{column} of {row['name']}: expected a file, got nothing in {path}")
    if "truth" in opened and opened["truth"].size != opened["image"].size:
        raise ValueError(f"truth of {row['name']}: expected the size of the image, {opened['image'].size}")
    return Item(name=row["name"], prompt=row["prompt"], colour=row.get("colour", ""), **opened)


def write_items(items: Sequence[Item], folder: Path) -> Path:
    """Write a folder that read_items reads, with PNG files; returns the list's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for item in items:
        row = {"name": item.name, "prompt": item.prompt, "colour": item.colour}
        for column in PICTURES:
            if (picture := getattr(item, column)) is not None:
                row[column] = f"{item.name}_{column}.png"
                picture.save(folder / row[column])
        rows.append(row)
    path = folder / LIST
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Item)], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def held_out(
    count: int = 96,
    *,
    kind: str = "reference",
    reference: Literal["own", "blank", "stranger"] = "own",
    prompts: bool = True,
    freedom: float = 1.0,
    seed: int = 1_000_000,
) -> list[Item]:
    """Synthetic items that the tiny model was not trained on: new subjects in held-out photos.

    Args:
        count: number of items.
        kind: "reference"; or "contradiction", where the prompt names another colour and the truth has it.
        reference: the reference picture: the subject itself, a blank, or the next item's subject.
        prompts: False: all prompts are empty.
        freedom: of the pose, 0 to 1, see tiny_fill.data.canvases.
        seed: the same seed gives the same items, whatever the other arguments change about them.
    """
    some = canvases(count, photos(HELD_OUT), torch.Generator().manual_seed(seed), freedom, kind=kind)
    uppers, lowers = some.pictures[:, :, :SIDE], some.pictures[:, :, SIDE:]
    if reference == "blank":
        uppers = torch.ones_like(uppers)
    elif reference == "stranger":
        uppers = uppers.roll(-1, 0)
    names, colours = list(COLOURS), some.subjects.colour.tolist()
    named = [
        bool(text) and pattern != PHOTO
        for text, pattern in zip(some.prompts, some.subjects.pattern.tolist(), strict=True)
    ]
    return [
        Item(
            name=f"{kind}_{i:04d}",
            prompt=some.prompts[i] if prompts else "",
            subject=to_picture(uppers[i]),
            image=to_picture(some.scenes[i]),
            mask=to_picture(some.masks[i, :, SIDE:]),
            truth=to_picture(lowers[i]),
            coverage=to_picture((some.coverage[i, :, SIDE:] > 0.5).float()),
            colour=names[colours[i]] if prompts and named[i] else "",
        )
        for i in range(count)
    ]


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """A picture of (3, height, width) values in [0, 1]; a mask of (1, height, width)."""
    levels = (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(levels[..., 0] if levels.shape[2] == 1 else levels))

"""Items of visual in-context learning: a folder of photos and ground truths, and a list of their prompts."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...pipelines import images as im
from ..csv_files import read_list

LIST = "pairs.csv"
COLUMNS = ("name", "image", "truth", "prompts")


@dataclass(frozen=True)
class Pair:
    """A photo and its ground truth.

    Attributes:
        name: unique within the folder, and valid in a file name.
        image: RGB; for colourisation the grey photo.
        truth: RGB, of the image's size; for colourisation the photo in colour.
        prompts: names of the pairs from which this one is predicted; empty: it is only a prompt of others.
    """

    name: str
    image: Image.Image
    truth: Image.Image
    prompts: tuple[str, ...] = ()


def read_pairs(folder: Path) -> list[Pair]:
    """Read the pairs that `folder`/pairs.csv lists.

    Its columns are name, image and truth (files, relative to the folder), and prompts: the names of the rows
    from which this one is predicted, separated by spaces; empty for a row that is only a prompt.

    Ground truths are drawn as the tasks read them, see visual_icl_tasks: white on black for segmentation,
    detection and edges; a colour for each class or keypoint, in a PNG file, without blending; the photo for
    colourisation.

    Raises:
        FileNotFoundError: the list or one of its files is missing.
        ValueError: a column is missing, a name appears twice or is not valid in a file name, a prompt is not
            listed or is the row itself, no row is to be predicted, sizes do not match, or a file is not a
            picture.
    """
    path = Path(folder) / LIST
    rows = read_list(path, "pairs", COLUMNS)
    names = [row["name"] for row in rows]
    if wrong := [
        name for name in names if not name or name.startswith(".") or set(name) & set('/\\ :*?"<>|')
    ]:
        raise ValueError(f"folder: {path}: expected names fit for a file, without spaces, got {wrong[0]!r}")
    pairs = [_read(path, row, names) for row in rows]
    if not any(pair.prompts for pair in pairs):
        raise ValueError(f"folder: {path} names no prompts, so that there is nothing to predict")
    return pairs


def _read(path: Path, row: dict[str, str], names: Sequence[str]) -> Pair:
    name, prompts = row["name"], tuple(row["prompts"].split())
    if unknown := [prompt for prompt in prompts if prompt not in names]:
        raise ValueError(f"folder: {path}: the prompt {unknown[0]!r} of {name} is not listed")
    if name in prompts:
        raise ValueError(f"folder: {path}: {name} is a prompt of itself, which would give its truth away")
    opened = []
    for column in ("image", "truth"):
        if not row[column]:
            raise ValueError(f"{column} of {name}: expected a file, got nothing in {path}")
        opened.append(im.flatten(im.open_image(path.parent / row[column], f"{column} of {name}")))
    image, truth = opened
    if truth.size != image.size:
        raise ValueError(f"truth of {name}: expected the size of the image, {image.size}, got {truth.size}")
    return Pair(name, image, truth, prompts)


def write_pairs(pairs: Sequence[Pair], folder: Path) -> Path:
    """Write a folder that read_pairs reads, with PNG files; returns the list's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LIST
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for pair in pairs:
            files = f"{pair.name}_image.png", f"{pair.name}_truth.png"
            for name, picture in zip(files, (pair.image, pair.truth), strict=True):
                picture.save(folder / name)
            writer.writerow([pair.name, *files, " ".join(pair.prompts)])
    return path

"""The six tasks of visual in-context learning: reading data from a predicted picture, and drawing it.

Ground truths are read by the same functions as predictions, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .. import images as im

TASKS = ("segmentation", "detection", "semantic", "keypoints", "edges", "colourisation")
Palette = Mapping[str, tuple[int, int, int]] | Sequence[tuple[int, int, int]] | np.ndarray
MAX_COLOURS = 256


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What a task reads from a picture (height, width).

    Attributes:
        data: by task:
            segmentation: (height, width) bool, the foreground;
            detection: (left, top, right, bottom) in pixels, right and bottom exclusive; None: nothing found;
            semantic: (height, width) int64, indices into the palette;
            keypoints: (points, 2) float64, x and y in pixels, NaN where a point is not found;
            edges: (height, width) float32 in [0, 1];
            colourisation: (height, width, 3) uint8 RGB.
        picture: the data drawn: L for segmentation, detection and edges, else RGB.
    """

    data: Any
    picture: Image.Image


def read_task(
    task: str,
    picture: Image.Image,
    *,
    query: Image.Image | None = None,
    palette: Palette | None = None,
    **options: Any,
) -> TaskResult:
    """Read a picture for a task, by the task's own function.

    Args:
        task: one of TASKS.
        picture: a prediction, or a ground truth.
        query: for colourisation, the photo whose lightness is kept, of the picture's size; None: the
            picture's.
        palette: for semantic and keypoints, the colours.
        options: of the task's function.

    Raises:
        ValueError: an unknown task, or a palette that is missing.
        TypeError: an option that the task's function does not have.
    """
    check_task(task)
    if task in ("semantic", "keypoints"):
        if palette is None:
            raise ValueError(f"palette: {task} needs one, see palette_of")
        options["palette"] = palette
    if task == "colourisation":
        options["query"] = query
    return _READERS[task](picture, **options)


def read_segmentation(picture: Image.Image, *, threshold: float = 0.5) -> TaskResult:
    """Foreground segmentation: pixels that are lighter than `threshold`, in [0, 1] from black to white."""
    mask = read_edges(picture).data > _in_unit("threshold", threshold)
    return TaskResult(mask, _grey(mask))


def read_detection(picture: Image.Image, *, threshold: float = 0.5) -> TaskResult:
    """Single object detection: the box with the most light minus dark pixels.

    Filled, it differs from the picture in the fewest pixels of all boxes. Specks outside and holes inside do
    not move it.
    """
    mask = read_segmentation(picture, threshold=threshold).data
    filled = Image.new("L", picture.size, 0)
    box = _best_box(mask)
    if box is not None:
        filled.paste(255, box)
    return TaskResult(box, filled)


def read_semantic(picture: Image.Image, *, palette: Palette) -> TaskResult:
    """Semantic segmentation: each pixel's class is the palette's nearest colour, by the distance in RGB."""
    colours = check_palette(palette)
    classes = _nearest(picture, colours)
    return TaskResult(classes, Image.fromarray(colours[classes]))


def read_keypoints(
    picture: Image.Image, *, palette: Palette, background: int = 0, radius: float | None = None
) -> TaskResult:
    """Keypoints, each drawn as a disc in a colour of its own: the position of each is the middle of its disc.

    A pixel belongs to the palette's nearest colour. The disc is searched where a point's pixels are densest;
    the point is the mean position of its pixels within twice the radius of that place. Pixels of its colour
    elsewhere do not move it.

    Args:
        picture: a prediction, or a ground truth.
        palette: the background's colour and each keypoint's.
        background: index of the background; the points keep the order of the other colours.
        radius: of a disc, in pixels; None: a fiftieth of the longer side, at least 1.

    Raises:
        ValueError: no such index, or a radius that is not positive.
    """
    colours = check_palette(palette)
    if not 0 <= background < len(colours):
        raise ValueError(f"background: expected an index from 0 to {len(colours) - 1}, got {background!r}")
    radius = max(1.0, max(picture.size) / 50) if radius is None else radius
    if not radius > 0:
        raise ValueError(f"radius: expected a number of pixels above 0, got {radius!r}")
    classes = _nearest(picture, colours)
    points = np.full((len(colours) - 1, 2), np.nan)
    drawn = Image.new("RGB", picture.size, tuple(colours[background].tolist()))
    pen = ImageDraw.Draw(drawn)
    for i, index in enumerate(j for j in range(len(colours)) if j != background):
        rows, columns = np.nonzero(classes == index)
        if not len(rows):
            continue
        density = np.asarray(_grey(classes == index).filter(ImageFilter.GaussianBlur(radius)))
        peak = np.argmax(density[rows, columns])  # one of the point's own pixels
        near = (rows - rows[peak]) ** 2 + (columns - columns[peak]) ** 2 <= (2 * radius) ** 2
        x, y = points[i] = columns[near].mean(), rows[near].mean()
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colours[index].tolist()))
    return TaskResult(points, drawn)


def read_edges(picture: Image.Image) -> TaskResult:
    """Edges: each pixel's lightness (ITU-R 601 luma), from 0 for black to 1 for white."""
    grey = im.flatten(picture).convert("L")
    return TaskResult(np.asarray(grey, np.float32) / 255, grey)


def read_colourisation(picture: Image.Image, *, query: Image.Image | None = None) -> TaskResult:
    """Colourisation: the picture's colours on the query's lightness (YCbCr), which keeps the photo's detail.

    Args:
        picture: a prediction, or a ground truth.
        query: the photo, of the picture's size; None: the picture's own lightness.

    Raises:
        ValueError: a query of another size.
    """
    coloured = im.flatten(picture)
    if query is not None:
        if query.size != picture.size:
            raise ValueError(f"query: expected the picture's size {picture.size}, got {query.size}")
        light = im.flatten(query).convert("L")
        coloured = Image.merge("YCbCr", [light, *coloured.convert("YCbCr").split()[1:]]).convert("RGB")
    return TaskResult(np.asarray(coloured).copy(), coloured)


_READERS: dict[str, Callable[..., TaskResult]] = {
    "segmentation": read_segmentation,
    "detection": read_detection,
    "semantic": read_semantic,
    "keypoints": read_keypoints,
    "edges": read_edges,
    "colourisation": read_colourisation,
}


def palette_of(pictures: Sequence[Image.Image]) -> np.ndarray:
    """All colours of ground truths, the most frequent first: (colours, 3) uint8.

    Raises:
        ValueError: no pictures, or more than 256 colours, as in a photo or with blended edges.
    """
    if not pictures:
        raise ValueError("palette: expected pictures to take it from, got none")
    pixels = np.concatenate([np.asarray(im.flatten(p)).reshape(-1, 3) for p in pictures])
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    if len(colours) > MAX_COLOURS:
        raise ValueError(
            f"palette: expected ground truths of at most {MAX_COLOURS} colours, got {len(colours)}: "
            "save them without blending and compression, or give a palette"
        )
    return colours[np.argsort(-counts, kind="stable")]


def check_palette(palette: Palette) -> np.ndarray:
    """A palette as an array, (colours, 3) uint8.

    Args:
        palette: RGB colours from 0 to 255, or a mapping from names to colours, in its order.

    Raises:
        ValueError: fewer than two colours, a colour twice, or numbers outside 0 to 255.
    """
    values = list(palette.values()) if isinstance(palette, Mapping) else palette
    colours = np.asarray(values)
    if colours.ndim != 2 or colours.shape[1] != 3 or colours.dtype.kind not in "iu" or len(colours) < 2:
        raise ValueError(
            f"palette: expected at least 2 RGB colours of whole numbers, got shape {colours.shape}"
        )
    if colours.min() < 0 or colours.max() > 255:
        raise ValueError(f"palette: expected numbers from 0 to 255, got {colours.min()} to {colours.max()}")
    if len(np.unique(colours, axis=0)) < len(colours):
        raise ValueError("palette: expected each colour once")
    return colours.astype(np.uint8)


def check_task(task: str) -> str:
    """Return the task; raise ValueError unless it is one of TASKS."""
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    return task


def _nearest(picture: Image.Image, colours: np.ndarray) -> np.ndarray:
    """Index of each pixel's nearest colour, the first of equally near ones: (height, width) int64."""
    pixels = np.asarray(im.flatten(picture)).astype(np.int32)
    best = np.full(pixels.shape[:2], np.iinfo(np.int32).max, np.int32)
    classes = np.zeros(pixels.shape[:2], np.int64)
    for i, colour in enumerate(colours.astype(np.int32)):
        distance = ((pixels - colour) ** 2).sum(-1)
        closer = distance < best
        best[closer], classes[closer] = distance[closer], i
    return classes


def _best_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """The box with the largest sum of on (1) and off (-1) pixels; the highest of equal ones."""
    if not mask.any():
        return None
    rows, columns = np.nonzero(mask)
    top, left = int(rows.min()), int(columns.min())
    score = np.where(mask[top : rows.max() + 1, left : columns.max() + 1], 1, -1)
    sums = np.pad(score.cumsum(0), ((1, 0), (0, 0)))  # (height + 1, width): of the rows above
    best, box = 0, None
    for first in range(len(score)):
        strips = sums[first + 1 :] - sums[first]  # (bottoms, width): rows first to bottom, each column
        run = np.pad(strips.cumsum(1), ((0, 0), (1, 0)))
        gain = run[:, 1:] - np.minimum.accumulate(run, 1)[:, :-1]
        if (most := int(gain.max())) > best:
            bottom, right = divmod(int(gain.argmax()), gain.shape[1])
            start = int(run[bottom, : right + 1].argmin())
            best, box = most, (left + start, top + first, left + right + 1, top + first + bottom + 1)
    return box


def _grey(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def _in_unit(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return value

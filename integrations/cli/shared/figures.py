"""Figures: inputs, results and head gains of insertions, attention maps, and grids of evaluated items."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...evaluation.insertion.evaluate import Outcome
    from ...evaluation.insertion.items import Item
    from ...methods import AttentionMaps
    from ...pipelines import InContextBrushOutput

HEIGHT = 3.9  # inches
CELL = 2.2  # inches of a picture in a grid
HOLE = (128, 128, 128)  # colour of the hole in a scene
INK = "#333333"


def insertion_report(output: InContextBrushOutput, item: int = 0, title: str = "") -> Figure:
    """Diptych, mask and result of one item of the batch beside its head gains, averaged over the steps.

    Args:
        output: of InContextBrushPipeline.
        item: index in the batch.
        title: of the figure.

    Raises:
        IndexError: no such item.
    """
    from matplotlib.figure import Figure

    pictures = {
        "diptych": output.diptychs[item],
        "mask": output.masks[item],
        "result": output.images[item],
    }
    gains = output.head_gains[:, :, item].mean(0).numpy()  # (layers, heads)
    # Not too narrow for the titles.
    shapes = [min(max(picture.width / picture.height, 0.4), 1.6) for picture in pictures.values()]
    width = HEIGHT * (sum(shapes) + 1.2)
    figure = Figure(figsize=(width, HEIGHT + 0.6), layout="constrained", facecolor="white")
    figure.suptitle(
        shorten(title, int(width * 10), placeholder=" …") or "In-Context Brush", fontsize=12, color=INK
    )
    *panels, map_axes = figure.subplots(1, 4, width_ratios=(*shapes, 1.0))
    for axes, (name, picture) in zip(panels, pictures.items(), strict=True):
        axes.imshow(np.asarray(picture.convert("RGB")))
        axes.set_title(name, fontsize=10, color=INK)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#bbbbbb")
    for axes in panels[:2]:
        axes.axhline(output.diptychs[item].height / 2 - 0.5, color="#bbbbbb", linewidth=0.8)
    _draw_gains(figure, map_axes, gains, output.layer_kinds)
    return figure


def insertion_grid(made: Sequence[tuple[Item, InContextBrushOutput]], title: str = "") -> Figure:
    """A row for each insertion: subject, scene with its hole, result, the result enlarged, head gains.

    Args:
        made: items, and the outputs of InContextBrushPipeline with the photo's pixels pasted back.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * CELL, len(made) * CELL + 0.6), layout="constrained", facecolor="white")
    figure.suptitle(title or "In-Context Brush", fontsize=12, color=INK)
    rows = figure.subplots(len(made), 5, squeeze=False, width_ratios=(1, 1.5, 1.5, 1, 1))
    for row, (item, output) in zip(rows, made, strict=True):
        diptych, box = output.diptychs[0], output.boxes[0]
        scene, result = item.image.convert("RGB"), output.images[0]
        scene.paste(HOLE, mask=item.mask)
        shown = {
            "subject": diptych.crop((0, 0, diptych.width, diptych.height // 2)),
            "scene": scene,
            "result": result,
            "result, enlarged": result.crop(box),
        }
        for axes, (name, picture) in zip(row, shown.items(), strict=False):
            axes.imshow(np.asarray(picture.convert("RGB")), interpolation="lanczos")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("#bbbbbb")
            axes.set_title(name, fontsize=10, color=INK)
        row[0].set_xlabel(fill(item.prompt, 22), fontsize=9, color=INK)
        _draw_gains(
            figure, row[4], output.head_gains[:, :, 0].mean(0).numpy(), output.layer_kinds, small=True
        )
    return figure


def maps_report(output: InContextBrushOutput, maps: AttentionMaps, title: str = "") -> Figure:
    """Attention maps over the finished diptych, one per name; below, shares of mass by layer and head gains.

    Args:
        output: of InContextBrushPipeline, called with `maps`.
        maps: after the call.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    means = {name: mean[0].cpu().numpy() for name, mean in maps.mean().items()}
    canvas = output.diptychs[0].copy()
    size = canvas.width, canvas.height // 2
    # The result is the panel itself without paste_back; with it, the panel is a part of the photo.
    seen = (
        output.images[0]
        if output.images[0].size == size
        else output.images[0].crop(output.boxes[0]).resize(size)
    )
    canvas.paste(seen, (0, size[1]))
    columns = 1 + len(means)
    figure = Figure(
        figsize=(max(columns * CELL, 8), 2 * CELL + HEIGHT + 0.8), layout="constrained", facecolor="white"
    )
    figure.suptitle(shorten(title, 110, placeholder=" …") or "In-Context Brush", fontsize=12, color=INK)
    halves: Any = figure.subfigures(2, 1, height_ratios=(2 * CELL, HEIGHT))
    above, below = halves
    axes = above.subplots(1, columns, squeeze=False)[0]
    for place, (name, mean) in zip(axes, {"canvas": None, **means}.items(), strict=True):
        place.imshow(
            np.asarray(canvas.convert("L" if mean is not None else "RGB")), cmap="gray", vmin=0, vmax=255
        )
        place.set(xticks=[], yticks=[])
        place.set_title(name, fontsize=10, color=INK)
        place.spines[:].set_visible(False)
        if mean is not None:
            extent = (-0.5, canvas.width - 0.5, canvas.height - 0.5, -0.5)
            heat = place.imshow(mean, cmap="inferno", alpha=0.65, extent=extent, interpolation="bilinear")
            bar = above.colorbar(heat, ax=place, fraction=0.08, shrink=0.6)
            bar.ax.tick_params(colors=INK, labelsize=7)
            bar.outline.set_visible(False)
    mass_axes, gain_axes = below.subplots(1, 2)
    _draw_mass(mass_axes, output)
    _draw_gains(below, gain_axes, output.head_gains[:, :, 0].mean(0).numpy(), output.layer_kinds)
    return figure


def _draw_mass(axes: Any, output: InContextBrushOutput) -> None:
    assert output.mass is not None
    rows = len(output.segments) - 1  # the target, or its hole
    mass = output.mass[:, :, 0, :, rows].mean((0, 2))  # (layers, key segments)
    shares = (mass / mass.sum(-1, keepdim=True)).numpy()
    left = np.zeros(len(shares))
    colours = ("#7b9acc", "#e0a458", "#8fb996", "#b07aa1", "#bbbbbb")
    for name, share, colour in zip(output.segments, shares.T, colours, strict=False):
        axes.bar(range(len(shares)), share, bottom=left, label=name, color=colour, width=0.9)
        left += share
    axes.set_title(
        f"what the {output.segments[rows]} attends to, mean over heads and steps", fontsize=10, color=INK
    )
    axes.set_xlabel("layer", color=INK)
    axes.set_ylim(0, 1)
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)


def outcome_grid(outcomes: Sequence[Outcome]) -> Figure:
    """A column for each insertion: subject, scene with its hole, result, and the truth where it is known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(len(outcomes) * 1.4, 6.2), layout="constrained", facecolor="white")
    rows = figure.subplots(4, len(outcomes), squeeze=False)
    for i, (column, outcome) in enumerate(zip(rows.T, outcomes, strict=True)):
        scene = outcome.item.image.convert("RGB")
        scene.paste(HOLE, mask=outcome.item.mask)
        shown = {
            "subject": outcome.item.subject,
            "scene": scene,
            "result": outcome.picture,
            "truth": outcome.item.truth,
        }
        for axes, (name, picture) in zip(column, shown.items(), strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if picture is not None:
                axes.imshow(np.asarray(picture.convert("RGB")), interpolation="lanczos")
            if not i:
                axes.set_ylabel(name, fontsize=10, color=INK)
        column[0].set_title(fill(outcome.item.prompt, 18), fontsize=7, color=INK)
    return figure


def _draw_gains(figure: Any, axes: Any, gains: np.ndarray, kinds: list[str], small: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    heat = axes.imshow(gains, aspect="auto", cmap="BuPu", interpolation="nearest")
    axes.set_title("head gains" if small else "head gains, mean over the steps", fontsize=10, color=INK)
    axes.set_xlabel("head", color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[:].set_visible(False)
    edges = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    for start, end in pairwise(edges):
        if start:
            axes.axhline(start - 0.5, color="white", linewidth=3)
        middle = (start + end - 1) / 2
        axes.text(
            -0.16,
            middle,
            kinds[start] + " blocks" * (not small),
            rotation=90,
            fontsize=9,
            color=INK,
            ha="center",
            va="center",
            transform=axes.get_yaxis_transform(),
        )
    bar = figure.colorbar(heat, ax=axes, fraction=0.06)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

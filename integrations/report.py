"""A figure of what In-Context Brush did: the diptych, the mask, the result, and the heads that it raised."""

from __future__ import annotations

from itertools import pairwise
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .pipelines import InContextBrushOutput

HEIGHT = 3.9  # inches
INK = "#333333"


def insertion_report(output: InContextBrushOutput, item: int = 0, title: str = "") -> Figure:
    """The pictures of one item of the batch beside its head gains, averaged over the steps.

    Args:
        output: of InContextBrushPipeline.
        item: of the batch.
        title: above all.

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
    shapes = [min(max(picture.width / picture.height, 0.4), 1.6) for picture in pictures.values()]  # titles need room
    width = HEIGHT * (sum(shapes) + 1.2)
    figure = Figure(figsize=(width, HEIGHT + 0.6), layout="constrained", facecolor="white")
    figure.suptitle(shorten(title, int(width * 10), placeholder=" …") or "In-Context Brush", fontsize=12, color=INK)
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


def _draw_gains(figure: Figure, axes: Any, gains: np.ndarray, kinds: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    heat = axes.imshow(gains, aspect="auto", cmap="BuPu", interpolation="nearest")
    axes.set_title("head gains, mean over the steps", fontsize=10, color=INK)
    axes.set_xlabel("head", color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[:].set_visible(False)
    edges = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    for first, end in pairwise(edges):
        if first:
            axes.axhline(first - 0.5, color="white", linewidth=3)
        middle = (first + end - 1) / 2
        axes.text(
            -0.16, middle, f"{kinds[first]} blocks", rotation=90, fontsize=9, color=INK, ha="center", va="center",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    bar = figure.colorbar(heat, ax=axes, fraction=0.06)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

"""A figure of what In-Context Brush did: the diptych, the mask, the result, and the heads that it raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .pipelines import InContextBrushOutput


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
    from matplotlib.ticker import MaxNLocator

    diptych, mask, result = output.diptychs[item], output.masks[item], output.images[item]
    shaded = Image.composite(Image.blend(diptych, Image.new("RGB", diptych.size, (220, 40, 40)), 0.6), diptych, mask)
    gains = output.head_gains[:, :, item].mean(0).numpy()  # (layers, heads)

    figure = Figure(figsize=(12, 4.4), layout="constrained", facecolor="white")
    figure.suptitle(title or "In-Context Brush", fontsize=12)
    axes = figure.subplots(1, 3, width_ratios=(diptych.width / diptych.height, result.width / result.height, 1.15))
    for axis, picture, name in ((axes[0], shaded, "input; red: the hole"), (axes[1], result, "result")):
        axis.imshow(np.asarray(picture))
        axis.set_title(name, fontsize=10)
        axis.set_axis_off()
    heat = axes[2].imshow(gains, aspect="auto", cmap="magma", interpolation="nearest")
    axes[2].set_title("gain of each head, mean over the steps", fontsize=10)
    axes[2].set_xlabel("head")
    axes[2].set_ylabel("layer")
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    singles = [i for i, kind in enumerate(output.layer_kinds) if kind == "single"]
    if singles and singles[0]:
        axes[2].axhline(singles[0] - 0.5, color="white", linewidth=1.5)
        axes[2].text(-0.4, singles[0] - 0.6, "double blocks", color="white", fontsize=8, va="bottom")
        axes[2].text(-0.4, singles[0] - 0.4, "single blocks", color="white", fontsize=8, va="top")
    figure.colorbar(heat, ax=axes[2])
    return figure

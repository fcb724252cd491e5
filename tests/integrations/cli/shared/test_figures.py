"""Figures of insertions: their contents, and that nothing overlaps."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashbrush.integrations.cli.shared.figures import insertion_grid, insertion_report, outcome_grid
from flashbrush.integrations.evaluation.insertion.evaluate import Outcome, Setting
from flashbrush.integrations.evaluation.insertion.items import Item
from flashbrush.integrations.pipelines import InContextBrushOutput


def output(
    layers: int = 57, heads: int = 24, size: tuple[int, int] = (60, 40), batch: int = 2
) -> InContextBrushOutput:
    """A result of FLUX's size: 19 double blocks and 38 single ones, 24 heads."""
    width, height = size
    none = torch.zeros(batch, 1, 1)
    return InContextBrushOutput(
        images=[Image.new("RGB", size, (200, 0, i)) for i in range(batch)],
        diptychs=[Image.new("RGB", (width, 2 * height), (0, 200, i)) for i in range(batch)],
        masks=[Image.new("L", (width, 2 * height), 255 * i) for i in range(batch)],
        boxes=[(0, 0, width, height)] * batch,
        latents=none,
        source_latents=none,
        known=none[..., 0] > 0,
        head_gains=torch.rand(3, layers, batch, heads, generator=torch.Generator().manual_seed(0)),
        layer_kinds=["double"] * (layers // 3) + ["single"] * (layers - layers // 3),
        seeds=[0] * batch,
    )


@pytest.mark.parametrize("item", [0, 1])
def test_the_report_shows_pictures_and_gains(item: int) -> None:
    made = output()
    diptych, mask, result, heat, bar = insertion_report(made, item, "a cat").axes
    for axes, picture in (
        (diptych, made.diptychs[item]),
        (mask, made.masks[item]),
        (result, made.images[item]),
    ):
        assert np.array_equal(axes.images[0].get_array(), np.asarray(picture.convert("RGB")))
    gains = made.head_gains[:, :, item].mean(0).numpy()
    assert np.array_equal(heat.images[0].get_array(), gains)
    assert heat.get_xlabel() == "head" and [text.get_text() for text in heat.texts] == [
        "double blocks",
        "single blocks",
    ]
    assert [text.get_position()[1] for text in heat.texts] == [9.0, 37.5]
    low, high = bar.get_ylim()
    assert low == pytest.approx(gains.min()) and high == pytest.approx(gains.max())


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (300, 40), (16, 160)])
def test_nothing_overlaps_or_is_cut_off(tmp_path: Path, size: tuple[int, int]) -> None:
    figure = insertion_report(output(size=size), title="a title, as long as a prompt can be " * 20)
    figure.savefig(tmp_path / "report.png", dpi=60)
    page = figure.bbox
    boxes = [box for axes in figure.axes[:4] if (box := axes.get_tightbbox())]
    for box in [*boxes, figure._suptitle.get_window_extent()]:
        assert (
            page.x0 - 1 <= box.x0
            and box.x1 <= page.x1 + 1
            and page.y0 - 1 <= box.y0
            and box.y1 <= page.y1 + 1
        )
    for left, right in pairwise(boxes):
        assert left.x1 <= right.x0 + 1
    assert np.asarray(Image.open(tmp_path / "report.png").convert("L")).std() > 10


def test_report_names_the_only_block_kind(tmp_path: Path) -> None:
    made = output(layers=2, heads=1, batch=1)
    made.head_gains, made.layer_kinds = torch.ones(1, 2, 1, 1), ["single"] * 2
    figure = insertion_report(made)
    figure.savefig(tmp_path / "report.png")
    assert [text.get_text() for text in figure.axes[3].texts] == ["single blocks"]


def test_grids_show_their_pictures(tmp_path: Path) -> None:
    made = [output(layers=3, heads=2, batch=1) for _ in range(2)]
    scene, hole = Image.new("RGB", (60, 40), (9, 9, 200)), Image.new("L", (60, 40))
    hole.paste(255, (10, 10, 20, 20))
    items = [Item(f"item_{i}", "a long prompt " * 4, scene, scene, hole) for i in range(2)]
    figure = insertion_grid(list(zip(items, made, strict=True)), "a title")
    figure.savefig(tmp_path / "grid.png", dpi=50)
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes[:5]]
    assert np.array_equal(shown[0], np.asarray(made[0].diptychs[0].crop((0, 0, 60, 40))))
    assert (shown[1][12, 12] == 128).all() and (shown[1][0, 0] == (9, 9, 200)).all()
    assert np.array_equal(shown[2], np.asarray(made[0].images[0]))
    assert np.array_equal(shown[4], made[0].head_gains[:, :, 0].mean(0).numpy())

    outcomes = [Outcome(item, 0, Setting(), made[0].images[0], {}) for item in items]
    figure = outcome_grid(outcomes)
    figure.savefig(tmp_path / "outcomes.png", dpi=50)
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["subject", "scene", "result", "truth"]
    assert not figure.axes[6].images and len(figure.axes[5].images) == 1


def test_missing_item_raises() -> None:
    with pytest.raises(IndexError):
        insertion_report(output(), 2)

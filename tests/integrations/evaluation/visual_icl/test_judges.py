"""Measures of the six tasks, on pictures whose values are known by hand."""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("torchmetrics")
from flashbrush.integrations.evaluation.visual_icl.judges import HIGHER_IS_BETTER, MEASURES, TaskJudge
from flashbrush.integrations.pipelines.shared.visual_icl_tasks import TASKS, read_task


def boxes(
    *places: tuple[int, int, int, int], size: tuple[int, int] = (8, 8), colour: str = "white"
) -> Image.Image:
    picture = Image.new("RGB", size)
    for box in places:
        picture.paste(colour, box)
    return picture


def judged(
    task: str, predictions: list[Image.Image], truths: list[Image.Image], **options
) -> tuple[list[dict], dict]:
    """(measures of each, measures of all)."""
    judge = TaskJudge(task, **options)
    palette = {"palette": options["palette"]} if "palette" in options else {}
    each = [
        judge.update(read_task(task, p, **palette).data, t) for p, t in zip(predictions, truths, strict=True)
    ]
    return each, judge.summary()


def test_segmentation_measures_equal_values_by_hand() -> None:
    left, top, nothing = boxes((0, 0, 4, 8)), boxes((0, 0, 8, 4)), boxes()
    each, total = judged("segmentation", [left, top, nothing, nothing], [top, top, nothing, top])
    assert [m["miou"] for m in each] == pytest.approx([16 / 48, 1, 1, 0]) and total["miou"] == pytest.approx(
        7 / 12
    )


def test_detection_measures_the_boxes() -> None:
    """A hole in the prediction, or a speck beside it, does not change its box."""
    truth = boxes((2, 0, 6, 4))
    holed = boxes((0, 0, 4, 4), (7, 7, 8, 8))
    holed.putpixel((1, 1), (0, 0, 0))
    each, total = judged("detection", [holed, truth, boxes()], [truth] * 3)
    assert [m["miou"] for m in each] == pytest.approx([8 / 24, 1, 0]) and total["miou"] == pytest.approx(
        4 / 9
    )


def test_semantic_sums_the_pixels_of_a_class_over_all_pictures() -> None:
    palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    red, small = boxes((0, 0, 4, 8), colour="red"), boxes((0, 0, 2, 8), colour="red")
    green = boxes((0, 0, 8, 8), colour="lime")
    each, total = judged("semantic", [small, green], [red, green], palette=palette)
    # Picture 1: black 32 of 48, red 16 of 32, no green; picture 2: green 64 of 64.
    assert [m["miou"] for m in each] == pytest.approx([(32 / 48 + 16 / 32) / 2, 1])
    assert total["miou"] == pytest.approx((32 / 48 + 16 / 32 + 1) / 3)
    _, other = judged("semantic", [small, boxes()], [red, green], palette=palette)
    assert other["miou"] == pytest.approx((32 / (48 + 64) + 16 / 32 + 0) / 3)


def test_keypoints_measures_equal_values_by_hand() -> None:
    palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    truth = boxes(size=(101, 51))
    for x, y, colour in ((20, 20, palette[1]), (80, 40, palette[2])):
        truth.paste(colour, (x - 1, y - 1, x + 2, y + 2))
    judge = TaskJudge("keypoints", palette=palette)
    near = np.array(
        [[23.0, 24.0], [80.0, 29.0], [7.0, 7.0]]
    )  # 5 and 11 pixels off; the truth has no third point
    assert judge.update(near, truth) == pytest.approx({"mse": (25 + 121) / 2 / 101**2, "pck": 0.5})
    nothing = np.full((3, 2), np.nan)  # counts as the middle, (50, 25)
    assert judge.update(nothing, truth) == pytest.approx(
        {"mse": (900 + 25 + 900 + 225) / 2 / 101**2, "pck": 0}
    )
    assert judge.summary() == pytest.approx({"mse": (25 + 121 + 925 + 1125) / 4 / 101**2, "pck": 1 / 4})
    assert TaskJudge("keypoints", palette=palette, reach=0.11).update(near, truth)["pck"] == 1
    assert TaskJudge("keypoints", palette=palette, reach=1).update(nothing, truth)["pck"] == 0
    with pytest.raises(ValueError, match="truth: expected at least one keypoint"):
        judge.update(near, boxes(size=(101, 51)))


def test_edges_measures_equal_values_by_hand() -> None:
    white, black, half = Image.new("L", (8, 8), 255), Image.new("L", (8, 8)), boxes((0, 0, 4, 8))
    each, total = judged("edges", [white, half, half], [black, black, half])
    assert [m["mse"] for m in each] == pytest.approx([1, 0.5, 0]) and total["mse"] == pytest.approx(0.5)


class MeanColour(nn.Module):
    num_features = 3

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.double().mean((2, 3)) / 255


def test_colourisation_distance_equals_a_known_shift() -> None:
    """All features move by 0.2 and keep their spread: the Fréchet distance is 0.2^2."""
    rng = np.random.default_rng(0)
    truths = [Image.fromarray(np.full((8, 8, 3), rng.integers(0, 200, 3), np.uint8)) for _ in range(6)]
    moved = [Image.fromarray(np.asarray(t) + np.array([0, 51, 0], np.uint8)) for t in truths]
    larger = [*moved[:5], moved[5].resize((16, 12))]
    judge = TaskJudge("colourisation", features=MeanColour())
    for p, t in zip(larger, [*truths[:5], truths[5].resize((16, 12))], strict=True):
        assert judge.update(np.asarray(p), t) == {}
    assert judge.summary() == pytest.approx({"fid_latents": 0.04}, abs=1e-5)
    _, same = judged("colourisation", truths, truths, features=MeanColour())
    assert same["fid_latents"] == pytest.approx(0, abs=1e-6)
    one = TaskJudge("colourisation", features=MeanColour())
    one.update(np.asarray(moved[0]), truths[0])
    with pytest.raises(ValueError, match="at least two"):
        one.summary()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_missing_torchvision_is_named() -> None:
    with pytest.raises(ImportError, match=r"lpips: .*orchvision"):
        TaskJudge("colourisation", lpips="alex")


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_a_missing_torch_fidelity_is_named() -> None:
    with pytest.raises(ImportError, match=r"fid: .*torch-fidelity"):
        TaskJudge("colourisation", features="inception")


def test_wrong_input_raises() -> None:
    with pytest.raises(ValueError, match=r"task: .*'depth'"):
        TaskJudge("depth")
    with pytest.raises(ValueError, match="palette: semantic needs one"):
        TaskJudge("semantic")
    with pytest.raises(ValueError, match=r"reach: .*1\.5"):
        TaskJudge("edges", reach=1.5)
    with pytest.raises(ValueError, match="expected at least one"):
        TaskJudge("edges").summary()
    with pytest.raises(ValueError, match=r"data: expected the truth's shape \(8, 8\), got \(4, 4\)"):
        TaskJudge("edges").update(np.zeros((4, 4)), boxes())


def test_every_task_has_a_described_measure_and_a_best_value() -> None:
    palette = [(0, 0, 0), (255, 255, 255)]
    for task in TASKS:
        needs = {"colourisation": {"features": MeanColour()}}.get(task, {})
        if task in ("semantic", "keypoints"):
            needs = {"palette": palette}
        truth = boxes((2, 2, 5, 5))
        _, total = judged(task, [truth] * 2, [truth] * 2, **needs)
        assert total and set(total) <= set(MEASURES)
        best = {name: 1.0 if name in HIGHER_IS_BETTER else 0.0 for name in total}
        assert total == pytest.approx(best, abs=1e-6), task
        assert not any(math.isnan(value) for value in total.values())

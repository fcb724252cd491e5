"""The six tasks, on clean and on disturbed pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flashbrush.integrations.pipelines.shared import visual_icl_tasks as vt

PALETTE = {"background": (0, 0, 0), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def with_noise(picture: Image.Image, noise: int = 60) -> Image.Image:
    """Uniform noise on every channel, as a model's picture has."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    return Image.fromarray(
        (pixels + rng().integers(-noise, noise + 1, pixels.shape)).clip(0, 255).astype(np.uint8)
    )


def box_picture(box: tuple[int, int, int, int], size: tuple[int, int] = (64, 48)) -> Image.Image:
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), box)
    return picture


def test_segmentation_reads_the_foreground_through_noise() -> None:
    result = vt.read_segmentation(with_noise(box_picture((10, 5, 40, 30))))
    expected = np.zeros((48, 64), bool)
    expected[5:30, 10:40] = True
    assert result.data.dtype == bool and np.array_equal(result.data, expected)
    assert result.picture.mode == "L" and np.array_equal(np.asarray(result.picture), expected * 255)
    grey = Image.new("L", (4, 4), 100)
    assert not vt.read_segmentation(grey).data.any() and vt.read_segmentation(grey, threshold=0.3).data.all()


@pytest.mark.parametrize("box", [(10, 5, 40, 30), (0, 0, 64, 48), (63, 47, 64, 48), (0, 20, 64, 21)])
def test_detection_reads_the_box_through_noise(box: tuple[int, int, int, int]) -> None:
    result = vt.read_detection(with_noise(box_picture(box)))
    assert result.data == box
    assert np.array_equal(np.asarray(result.picture), np.asarray(box_picture(box).convert("L")))


def test_detection_equals_a_search_over_all_boxes() -> None:
    """On small random masks."""
    for seed in range(20):
        mask = np.random.default_rng(seed).random((5, 6)) < 0.5
        found = vt.read_detection(Image.fromarray(mask.astype(np.uint8) * 255)).data
        score = np.where(mask, 1, -1)
        boxes = [
            (l, t, r, b) for l in range(6) for r in range(l + 1, 7) for t in range(5) for b in range(t + 1, 6)
        ]
        best = max(score[t:b, l:r].sum() for l, t, r, b in boxes)
        assert score[found[1] : found[3], found[0] : found[2]].sum() == best


def test_specks_and_holes_do_not_move_the_box() -> None:
    picture = box_picture((20, 10, 50, 40))
    pixels = np.asarray(picture).copy()
    where = rng().random(pixels.shape[:2]) < 0.04
    pixels[where] = 255 - pixels[where]
    left, top, right, bottom = vt.read_detection(Image.fromarray(pixels)).data
    assert np.abs(np.array([left - 20, top - 10, right - 50, bottom - 40])).max() <= 1


def test_dark_picture_has_no_box() -> None:
    result = vt.read_detection(Image.new("RGB", (8, 8)))
    assert result.data is None and not np.asarray(result.picture).any()


def test_semantic_reads_classes_through_noise() -> None:
    classes = rng().integers(0, 4, (12, 16))
    drawn = Image.fromarray(vt.check_palette(PALETTE)[classes])
    result = vt.read_semantic(with_noise(drawn, 100), palette=PALETTE)
    assert np.array_equal(result.data, classes) and result.data.dtype == np.int64
    assert result.picture.tobytes() == drawn.tobytes()


def test_palettes_come_from_ground_truths() -> None:
    a, b = Image.new("RGB", (4, 4), (1, 2, 3)), Image.new("RGB", (2, 2), (9, 8, 7))
    assert vt.palette_of([b, a]).tolist() == [[1, 2, 3], [9, 8, 7]]
    with pytest.raises(ValueError, match=r"palette: .*at most 256 colours, got \d{3,}"):
        vt.palette_of([Image.fromarray(rng().integers(0, 256, (32, 32, 3), dtype=np.uint8))])
    with pytest.raises(ValueError, match=r"palette: .*none"):
        vt.palette_of([])


@pytest.mark.parametrize(
    ("palette", "match"),
    [
        ([(0, 0, 0)], r"at least 2 .*\(1, 3\)"),
        ([(0, 0), (1, 1)], r"\(2, 2\)"),
        ([(0, 0, 0), (0, 0, 256)], "0 to 255, got 0 to 256"),
        ([(0, 0, 0), (-1, 0, 0)], "got -1 to 0"),
        ([(0.0, 0, 0), (1, 0, 0)], "whole numbers"),
        ([(1, 2, 3), (1, 2, 3)], "each colour once"),
    ],
)
def test_wrong_palettes_raise(palette, match: str) -> None:
    with pytest.raises(ValueError, match=f"palette: .*{match}"):
        vt.read_semantic(Image.new("RGB", (2, 2)), palette=palette)


def test_keypoints_are_found_among_stray_pixels() -> None:
    places = {"red": (12, 10), "green": (40, 30), "blue": (55, 12)}
    picture = Image.new("RGB", (64, 48))
    pen = ImageDraw.Draw(picture)
    for name, (x, y) in places.items():
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=PALETTE[name])
    pen.point([(60, 45), (3, 40)], fill=PALETTE["red"])  # stray pixels
    result = vt.read_keypoints(with_noise(picture, 80), palette=PALETTE, radius=2)
    np.testing.assert_allclose(result.data, np.array(list(places.values())), atol=0.5)
    again = vt.read_keypoints(result.picture, palette=PALETTE, radius=2)
    np.testing.assert_allclose(again.data, result.data, atol=0.6)


def test_missing_keypoints_are_nan() -> None:
    picture = Image.new("RGB", (20, 20), (0, 0, 255))
    picture.paste((0, 255, 0), (4, 6, 7, 9))
    result = vt.read_keypoints(picture, palette=PALETTE, background=3)
    assert (
        result.data.shape == (3, 2)
        and result.data[2].tolist() == [5.0, 7.0]
        and np.isnan(result.data[:2]).all()
    )
    assert result.picture.getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ValueError, match=r"background: .*0 to 3, got 4"):
        vt.read_keypoints(picture, palette=PALETTE, background=4)
    with pytest.raises(ValueError, match=r"radius: .*0"):
        vt.read_keypoints(picture, palette=PALETTE, radius=0)


def test_edges_are_the_lightness() -> None:
    levels = rng().integers(0, 256, (6, 5), dtype=np.uint8)
    result = vt.read_edges(Image.fromarray(levels))
    assert result.data.dtype == np.float32
    np.testing.assert_allclose(result.data, levels / 255, atol=1e-6)
    assert np.array_equal(np.asarray(result.picture), levels)


def test_colourisation_keeps_the_photo_s_detail() -> None:
    photo = rng().integers(90, 180, (10, 12), dtype=np.uint8)  # with these colours within RGB's range
    predicted = Image.new("RGB", (12, 10), (180, 120, 60))
    result = vt.read_colourisation(predicted, query=Image.fromarray(photo))
    assert np.abs(np.asarray(result.picture.convert("L")).astype(int) - photo).max() <= 3
    blue_red = np.asarray(result.picture.convert("YCbCr"))[..., 1:].astype(int)
    assert np.abs(blue_red - np.asarray(predicted.convert("YCbCr"))[..., 1:]).max() <= 2
    assert np.array_equal(result.data, np.asarray(result.picture)) and result.data.dtype == np.uint8
    assert vt.read_colourisation(predicted).picture.tobytes() == predicted.tobytes()
    with pytest.raises(ValueError, match=r"query: .*\(12, 10\), got \(3, 3\)"):
        vt.read_colourisation(predicted, query=Image.new("RGB", (3, 3)))


@pytest.mark.parametrize("task", vt.TASKS)
def test_read_task_calls_the_task_s_function(task: str) -> None:
    picture = box_picture((2, 2, 9, 9), (16, 12))
    palette = [(0, 0, 0), (255, 255, 255)]
    result = vt.read_task(task, picture, query=picture, palette=palette)
    assert result.picture.size == picture.size
    expected = {"detection": (2, 2, 9, 9), "keypoints": [[5.0, 5.0]]}.get(task)
    assert expected is None or np.array_equal(np.asarray(result.data), np.asarray(expected))


def test_wrong_tasks_raise() -> None:
    with pytest.raises(ValueError, match=r"task: expected one of segmentation, .*'depth'"):
        vt.read_task("depth", Image.new("RGB", (2, 2)))
    with pytest.raises(ValueError, match="palette: semantic needs one"):
        vt.read_task("semantic", Image.new("RGB", (2, 2)))
    with pytest.raises(TypeError, match="threshold"):
        vt.read_task("edges", Image.new("RGB", (2, 2)), threshold=0.5)
    with pytest.raises(ValueError, match=r"threshold: .*1\.5"):
        vt.read_task("segmentation", Image.new("RGB", (2, 2)), threshold=1.5)

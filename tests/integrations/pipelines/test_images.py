"""Photos, masks and diptychs: formats and modes of cameras and editors, resizing, cropping and pasting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashbrush.integrations.pipelines import images as im


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp", "gif", "ppm", "tga", "jp2"])
def test_every_format_opens_as_rgb(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (16, 8), (200, 100, 40)).save(tmp_path / f"photo.{suffix}")
    photo = im.open_image(tmp_path / f"photo.{suffix}")
    assert photo.mode == "RGB" and photo.size == (16, 8)
    assert np.abs(np.asarray(photo).astype(int) - (200, 100, 40)).max() <= 6


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"]
)
def test_every_mode_opens_as_rgb_or_rgba(mode: str) -> None:
    picture = im.open_image(Image.new(mode, (6, 4)))
    assert picture.mode == ("RGBA" if mode in ("LA", "PA", "RGBA") else "RGB") and picture.size == (6, 4)


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (Image.new("F", (4, 4)), ValueError, "photo: floating-point"),
        (Image.new("La", (4, 4)), ValueError, "photo: pixels of mode La"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), ValueError, "photo: 32-bit"),
        (Image.new("RGB", (0, 4)), ValueError, "photo: the image is empty"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "photo: the array is empty"),
        (np.zeros((4, 4, 2), np.uint8), TypeError, r"photo: .*\(4, 4, 2\)"),
        (np.zeros((4, 4, 3), np.float64), TypeError, "photo: .*float64"),
        (3, TypeError, "photo: .*int"),
        ("none.png", FileNotFoundError, "photo: no such file: none.png"),
    ],
)
def test_wrong_photos_raise(source, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        im.open_image(source, "photo")


def test_photos_over_the_limit_are_refused(tmp_path: Path) -> None:
    Image.new("L", (100, 50)).save(tmp_path / "wide.png")
    for source in (tmp_path / "wide.png", Image.new("L", (100, 50))):
        assert im.open_image(source, max_pixels=5000).size == (100, 50)
        with pytest.raises(ValueError, match=r"100x50 pixels are more than the limit"):
            im.open_image(source, max_pixels=4999)


def test_sixteen_bits_keep_their_levels(tmp_path: Path) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert np.asarray(im.open_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(noise(6, 4))
    picture.save(tmp_path / "camera.png", exif=exif)
    upright = np.asarray(im.open_image(tmp_path / "camera.png"))
    pixels = np.asarray(picture)
    turns = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]}
    turns |= {
        k: np.swapaxes(v, 0, 1)
        for k, v in zip((5, 6, 7, 8), (pixels, pixels[::-1], pixels[::-1, ::-1], pixels[:, ::-1]))
    }
    assert np.array_equal(upright, turns[orientation])


def test_transparency_becomes_a_mask_and_white() -> None:
    pixels = noise(4, 2, 4)
    pixels[0, :, 3], pixels[1, :, 3] = (0, 127, 128, 255), 255
    picture = im.open_image(pixels)
    mask = im.alpha_mask(picture)
    assert mask is not None and np.asarray(mask)[0].tolist() == [0, 0, 255, 255]
    flat = np.asarray(im.flatten(picture))
    assert (flat[0, 0] == 255).all() and np.array_equal(flat[1], pixels[1, :, :3])
    opaque = Image.fromarray(pixels[..., :3]).convert("RGBA")
    assert im.alpha_mask(opaque) is None and im.alpha_mask(Image.new("RGB", (2, 2))) is None


def test_a_mask_is_on_where_it_is_light_and_opaque() -> None:
    pixels = np.zeros((3, 4, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[0, :, :3] = np.array([0, 127, 128, 255])[:, None]
    pixels[1, :, :3], pixels[1, :, 3] = 255, (0, 100, 200, 255)
    mask = np.asarray(im.open_mask(pixels, (4, 3)))
    assert mask.tolist() == [[0, 0, 255, 255], [0, 0, 255, 255], [0] * 4]
    with pytest.raises(ValueError, match="hole: expected the size of the scene, 3x4 pixels, got 4x3"):
        im.open_mask(pixels, (3, 4), "hole", "scene")


def test_resized_masks_keep_thin_lines() -> None:
    mask = Image.new("L", (64, 48))
    mask.putpixel((20, 10), 255)
    assert im.resize_mask(mask, (16, 12)).getbbox() == (5, 2, 6, 3)
    assert im.resize_mask(mask, (64, 48)) is mask
    almost = Image.new("L", (64, 48), 255)
    almost.putpixel((0, 0), 0)
    with pytest.raises(ValueError, match=r"mask \(resized to 2x2\): everything is on"):
        im.resize_mask(almost, (2, 2))


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [
        ((640, 480), {}, (640, 480)),
        ((645, 470), {}, (640, 464)),
        ((4000, 3000), {}, (1184, 880)),
        ((600, 400), {"width": 96}, (96, 64)),
        ((600, 400), {"height": 96}, (144, 96)),
        ((600, 400), {"width": 64, "height": 64}, (64, 64)),
        ((3, 1010), {}, (16, 1008)),
    ],
)
def test_panel_size_follows_the_photo_and_the_arguments(
    size: tuple[int, int], asked: dict[str, int], expected: tuple[int, int]
) -> None:
    assert im.panel_size(size, **asked) == expected


@pytest.mark.parametrize("size", [(40, 10), (10, 40), (200, 300), (64, 48)])
def test_the_subject_is_centred_and_fills_its_panel(size: tuple[int, int]) -> None:
    subject = Image.new("RGB", size, (10, 20, 30))
    mask = Image.new("L", size)
    mask.paste(255, (2, 3, size[0] - 2, size[1] - 1))
    panel = np.asarray(im.subject_panel(subject, mask, (64, 48)))
    assert panel.shape == (48, 64, 3)
    rows, columns = np.nonzero((panel != 255).any(2))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert max(width / 64, height / 48) == pytest.approx(0.9, abs=0.03)
    assert width / height == pytest.approx((size[0] - 4) / (size[1] - 4), rel=0.12)
    assert abs(rows.min() - (47 - rows.max())) <= 1 and abs(columns.min() - (63 - columns.max())) <= 1
    assert (panel[rows.min() : rows.max(), columns.min() : columns.max()] == (10, 20, 30)).all()


def test_lower_panel_undoes_stack() -> None:
    top, bottom = Image.fromarray(noise(6, 4)), Image.new("RGB", (6, 4), (1, 2, 3))
    canvas = im.stack(top, bottom)
    assert canvas.size == (6, 8) and np.array_equal(np.asarray(canvas)[:4], np.asarray(top))
    assert im.lower_panel(canvas).tobytes() == bottom.tobytes()


def test_rgb_colour_profiles_are_kept(tmp_path: Path) -> None:
    mask = Image.new("L", (4, 4))
    mask.putpixel((1, 1), 255)
    for mode, kept in (("RGB", True), ("RGBA", True), ("L", False), ("CMYK", False)):
        Image.new(mode, (4, 4)).save(tmp_path / "photo.tiff", icc_profile=b"a profile")
        photo = im.flatten(im.open_image(tmp_path / "photo.tiff"))
        result = im.paste_back(Image.new("RGB", (4, 4), (9, 9, 9)), photo, mask)
        assert (result.info.get("icc_profile") == b"a profile") is kept, mode
        result.save(tmp_path / "result.png")
        assert ("icc_profile" in Image.open(tmp_path / "result.png").info) is kept

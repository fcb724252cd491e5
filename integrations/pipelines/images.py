"""Photos, masks and diptychs as PIL images: opening them safely, resizing, cropping and pasting.

Sizes are PIL's (width, height) in pixels. A photo is RGB; a mask is L, 255 where it is on and 0 elsewhere.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps

MAX_PIXELS = 64_000_000  # of a file; larger ones are refused before they are decoded
PANEL_PIXELS = 1024 * 1024  # of a panel whose size is not given: two of them are FLUX's limit of 2 megapixels
WHITE = (255, 255, 255)
# Formats of cameras, browsers and image editors; none whose decoder runs another program (EPS, WMF).
FORMATS = (
    "AVIF",
    "BMP",
    "GIF",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PNG",
    "PPM",
    "TGA",
    "TIFF",
    "WEBP",
)

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


def open_image(source: ImageLike, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image as RGB, or as RGBA where it has transparency, turned upright by its EXIF orientation.

    Args:
        source: a file in one of FORMATS (the first frame is taken), a PIL image, or a uint8 array (height,
            width), (height, width, 3) or (height, width, 4).
        name: what errors call it.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        FileNotFoundError: no such file.
        TypeError: neither a file nor an image.
        ValueError: not an image, truncated, too large, empty, or of a pixel format that is not supported.
    """
    if isinstance(source, np.ndarray):
        return _upright(_from_array(source, name), name)
    if isinstance(source, Image.Image):
        _check_pixels(source.size, name, max_pixels)
        return _upright(source, name)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a file, a PIL image or a uint8 array, got {type(source).__name__}")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file: {path}")
    if path.is_dir():
        raise ValueError(f"{name}: expected an image file, got a folder: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_pixels is stricter
            image = Image.open(path, formats=[f for f in FORMATS if f in _registered()])
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {path} is larger than {max_pixels / 1e6:g} megapixels") from error
    except (Image.UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{name}: {path} is not an image in one of the formats {', '.join(FORMATS)}"
        ) from error
    with image:
        _check_pixels(image.size, f"{name}: {path}", max_pixels)
        try:
            image.load()
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ValueError(f"{name}: {path} is damaged or cut off ({error})") from error
        return _upright(image, f"{name}: {path}")


def flatten(image: Image.Image) -> Image.Image:
    """RGB, with transparent parts over white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    page = Image.new("RGBA", image.size, (*WHITE, 255))
    return _same_colours(Image.alpha_composite(page, image).convert("RGB"), image)


def alpha_mask(image: Image.Image) -> Image.Image | None:
    """The opaque part (alpha of at least 128) as a mask; None for an image without transparency."""
    if image.mode != "RGBA":
        return None
    alpha = image.getchannel("A")
    return None if alpha.getextrema()[0] == 255 else binary(alpha)


def open_mask(source: ImageLike, size: tuple[int, int], name: str = "mask", of: str = "image") -> Image.Image:
    """Open a mask: on where the picture is light (a grey level of at least 128), off where it is transparent.

    Args:
        source: as in open_image.
        size: that the mask must have.
        name: what errors call it.
        of: what errors call the image of that size.

    Raises:
        FileNotFoundError, TypeError: as open_image.
        ValueError: as open_image; another size than `size`; nothing or everything is on.
    """
    picture = open_image(source, name)
    if picture.size != size:
        raise ValueError(
            f"{name}: expected the size of the {of}, {size_text(size)} pixels, got {size_text(picture.size)}"
        )
    grey = picture.convert("L")  # ignores the alpha channel
    if picture.mode == "RGBA":
        grey = ImageChops.multiply(grey, picture.getchannel("A"))
    return check_mask(binary(grey), name)


def check_mask(mask: Image.Image, name: str = "mask") -> Image.Image:
    """Return the mask; raise ValueError if it is empty or covers everything."""
    low, high = mask.getextrema()
    if high == 0:
        raise ValueError(f"{name}: nothing is on: expected white pixels to mark a region")
    if low == 255:
        raise ValueError(f"{name}: everything is on: expected black pixels around the white region")
    return mask


def binary(grey: Image.Image) -> Image.Image:
    """255 where the level is at least 128, else 0."""
    return grey.point([0] * 128 + [255] * 128)


def panel_size(
    size: tuple[int, int],
    *,
    width: int | None = None,
    height: int | None = None,
    multiple: int = 16,
    max_pixels: int = PANEL_PIXELS,
) -> tuple[int, int]:
    """The size at which the model sees a photo: multiples of `multiple`, near the photo's own proportions.

    Args:
        size: of the photo.
        width: as asked for, in pixels; None: from the height and the proportions.
        height: as asked for, in pixels; None: from the width and the proportions. With neither, the photo's
            own size, reduced where it has more than `max_pixels`.
        multiple: of which both must be multiples.
        max_pixels: of a size that is not asked for.

    Raises:
        ValueError: a width or height that is not positive, or not a multiple; more than 64 megapixels.
    """
    for name, value in (("width", width), ("height", height)):
        if value is not None and (value <= 0 or value % multiple):
            raise ValueError(f"{name}: expected a positive multiple of {multiple} pixels, got {value}")
    w, h = size
    if width is not None or height is not None:
        scale = width / w if width is not None else (height or h) / h
    else:
        scale = min(1.0, math.sqrt(max_pixels / (w * h)))
    found = width or _multiple(w * scale, multiple), height or _multiple(h * scale, multiple)
    if found[0] * found[1] > MAX_PIXELS:
        name, value = ("width", width) if width is not None else ("height", height)
        raise ValueError(
            f"{name}: expected at most {MAX_PIXELS // 10**6} megapixels, got {value}: {found[0]}x{found[1]}"
        )
    return found


def resize_photo(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The photo at another size, by Lanczos; the photo itself where it has the size."""
    return photo if photo.size == size else photo.resize(size, Image.Resampling.LANCZOS)


def resize_mask(mask: Image.Image, size: tuple[int, int], name: str = "mask") -> Image.Image:
    """A mask at another size: on where it is on in any part of a pixel, so that thin masks do not vanish.

    Raises:
        ValueError: everything is on at the new size.
    """
    if mask.size == size:
        return mask
    shrunk = mask.resize(size, Image.Resampling.BOX)
    return check_mask(shrunk.point([0] + [255] * 255), f"{name} (resized to {size_text(size)})")


def on_white(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """The image as RGB, white where the mask is off."""
    picture = flatten(image)
    if mask is None:
        return picture
    return Image.composite(picture, Image.new("RGB", picture.size, WHITE), mask)


def crop_box(mask: Image.Image, padding: int, proportions: float) -> tuple[int, int, int, int]:
    """The box around a mask, widened to the given proportions where the picture has room.

    Args:
        mask: not empty.
        padding: pixels on every side, as `padding_mask_crop` of diffusers' inpainting pipelines.
        proportions: width / height of the box.

    Returns:
        (left, top, right, bottom) in pixels.

    Raises:
        ValueError: a padding that is not a whole number of 0 or more.
    """
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding_mask_crop: expected a number of pixels, 0 or more, got {padding!r}")
    box = mask.getbbox()
    assert box is not None, "an empty mask is refused by check_mask"
    width, height = (box[i + 2] - box[i] + 2 * padding for i in (0, 1))
    wanted = max(width, round(height * proportions)), max(height, round(width / proportions))
    size = [min(a, b) for a, b in zip(wanted, mask.size, strict=True)]
    middle = [(box[i] + box[i + 2]) / 2 for i in (0, 1)]
    left, top = (min(max(round(middle[i] - size[i] / 2), 0), mask.size[i] - size[i]) for i in (0, 1))
    return left, top, left + size[0], top + size[1]


def subject_panel(
    subject: Image.Image, mask: Image.Image | None, size: tuple[int, int], fill: float = 0.9
) -> Image.Image:
    """The subject alone, on white, in the middle of a panel, as large as fits with its proportions kept.

    Args:
        subject: of any size.
        mask: of the subject's size; None: the whole picture is the subject.
        size: of the panel.
        fill: share of the panel's width or height that the mask's bounding box takes; without a mask, 1.
    """
    picture = on_white(subject, mask)
    if mask is not None:
        box = mask.getbbox()
        assert box is not None, "an empty mask is refused by check_mask"
        picture = picture.crop(box)
    else:
        fill = 1.0
    scale = min(size[0] * fill / picture.width, size[1] * fill / picture.height)
    fitted = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    panel = Image.new("RGB", size, WHITE)
    corner = (size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2
    panel.paste(picture.resize(fitted, Image.Resampling.LANCZOS), corner)
    return panel


def stack(top: Image.Image, bottom: Image.Image) -> Image.Image:
    """A vertical diptych of two panels of one size and mode; each is contiguous in FLUX's token order."""
    canvas = Image.new(top.mode, (top.width, top.height + bottom.height))
    canvas.paste(top, (0, 0))
    canvas.paste(bottom, (0, top.height))
    return canvas


def lower_panel(canvas: Image.Image) -> Image.Image:
    """The lower half of a diptych."""
    return canvas.crop((0, canvas.height // 2, canvas.width, canvas.height))


def paste_back(
    generated: Image.Image,
    photo: Image.Image,
    mask: Image.Image,
    box: tuple[int, int, int, int] | None = None,
) -> Image.Image:
    """The photo with `generated` where the mask is on; its other pixels stay identical.

    Args:
        generated: a picture of `box`, of any size.
        photo: into which it is pasted.
        mask: of the photo's size.
        box: the part of the photo that was generated, (left, top, right, bottom) in pixels; None: all of it.
    """
    left, top, right, bottom = box or (0, 0, *photo.size)
    whole = photo.copy()
    whole.paste(resize_photo(generated, (right - left, bottom - top)), (left, top))
    return _same_colours(Image.composite(whole, photo, mask), photo)


def _same_colours(picture: Image.Image, source: Image.Image) -> Image.Image:
    """`picture` with the colour profile of `source`, which says what colours its numbers are."""
    if profile := source.info.get("icc_profile"):
        picture.info["icc_profile"] = profile
    return picture


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise TypeError(
            f"{name}: expected a uint8 array (height, width), (height, width, 3) or (height, width, 4), "
            f"got {array.dtype} of shape {array.shape}"
        )
    if array.size == 0:
        raise ValueError(f"{name}: the array is empty, of shape {array.shape}")
    return Image.fromarray(array)


def _upright(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"{name}: the image is empty, {size_text(image.size)} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bit grey, which convert() would clip
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name}: 32-bit integer pixels outside of 0..65535 are not supported")
        return Image.fromarray((values.astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError(f"{name}: floating-point pixels are not supported; save it with 8 bits per channel")
    colours = image.mode in ("RGB", "RGBA", "P", "PA")
    try:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except ValueError as error:
        raise ValueError(f"{name}: pixels of mode {image.mode} are not supported; save it as RGB") from error
    if not colours:
        image.info.pop("icc_profile", None)  # a profile of inks or greys does not describe RGB
    return image


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ValueError(
            f"{name}: {size_text(size)} pixels are more than the limit of {max_pixels / 1e6:g} megapixels"
        )


def _registered() -> dict[str, Any]:
    Image.init()
    return Image.OPEN


def _multiple(length: float, multiple: int) -> int:
    return max(multiple, round(length / multiple) * multiple)


def size_text(size: tuple[int, int]) -> str:
    """(64, 48) as "64x48"."""
    return f"{size[0]}x{size[1]}"


def mask_cells(mask: Image.Image, side: int) -> np.ndarray:
    """Squares of side x side pixels in which any pixel is on, bool (rows, columns).

    Args:
        mask: whose width and height are multiples of `side`.
        side: in pixels.
    """
    return np.asarray(mask).reshape(mask.height // side, side, mask.width // side, side).max(axis=(1, 3)) > 0

"""Arguments for the tiny model, which was trained on one size of panel, hole and subject."""

from __future__ import annotations

from typing import Any

from PIL import Image

from .data.canvases import SIDE

HOLE = 0.72  # side of the hole over that of the panel; in training 0.5 to 0.9
SUBJECT = 0.62  # side of the subject over that of the panel; in training 0.45 to 0.75
STEPS = 6  # as in the committed tables


def options(hole: Image.Image) -> dict[str, Any]:
    """Arguments of InContextBrushPipeline's call for a photo with this mask, which must not be empty.

    The crop around the hole is such that the hole takes HOLE of the panel's side.
    """
    box = hole.getbbox()
    assert box is not None, "an empty mask is refused by check_mask"
    side = max(box[2] - box[0], box[3] - box[1])
    padding = round(side * (1 / HOLE - 1) / 2)
    return {
        "width": SIDE,
        "height": SIDE,
        "padding_mask_crop": padding,
        "subject_fill": SUBJECT,
        "steps": STEPS,
    }

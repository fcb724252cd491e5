"""How the tiny model that comes with the package wants to be asked: it knows one size of panel, hole and
subject.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from .data.canvases import SIDE

HOLE = 0.72  # of a panel's side: what it saw ranges from 0.5 to 0.9
SUBJECT = 0.62  # of a panel's side, as large as it is to appear: 0.45 to 0.75
STEPS = 6  # those of the committed tables


def options(hole: Image.Image) -> dict[str, Any]:
    """Arguments of InContextBrushPipeline's call for a photo with this mask (checked, not empty)."""
    box = hole.getbbox()
    assert box is not None, "check_mask comes first"
    side = max(box[2] - box[0], box[3] - box[1])
    padding = round(side * (1 / HOLE - 1) / 2)
    return {
        "width": SIDE,
        "height": SIDE,
        "padding_mask_crop": padding,
        "subject_fill": SUBJECT,
        "steps": STEPS,
    }

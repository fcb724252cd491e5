"""What the tests of editing pipelines share."""

from __future__ import annotations

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    """One rectangle that no token's edge meets, of 64 x 48 pixels."""
    picture = Image.new("L", (64, 48), 0)
    picture.paste(255, (17, 9, 39, 30))
    return picture

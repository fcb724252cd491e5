"""flashbrush demo: its pictures and report."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flashbrush.integrations.cli import demo
from flashbrush.integrations.evaluation.insertion.items import read_items

from ..command import STEPS, flashbrush


def test_demo_writes_pictures_and_report(capsys, tmp_path) -> None:
    pytest.importorskip("skimage")
    code, out, err = flashbrush(capsys, "demo", "-o", tmp_path / "demo", *STEPS)
    assert code == 0, err
    assert str(tmp_path / "demo" / "report.png") in out and "seconds for an insertion" in out
    items = read_items(tmp_path / "demo" / "photos")
    assert len(items) >= 4
    for item in items:
        scene, mask = np.asarray(item.image), np.asarray(item.mask)
        result = np.asarray(Image.open(tmp_path / "demo" / f"{item.name}.png"))
        assert (result[mask == 0] == scene[mask == 0]).all() and (result[mask > 0] != scene[mask > 0]).any()
    assert Image.open(tmp_path / "demo" / "report.png").size[1] > 1000
    demo.check_demo_folder(tmp_path / "demo")  # a second demo may overwrite it

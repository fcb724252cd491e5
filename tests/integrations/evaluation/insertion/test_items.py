"""Items of subject insertion: what a synthetic item hides, and folders that are written, read or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from flashbrush.integrations.evaluation.insertion.items import LIST, held_out, read_items, write_items


@pytest.fixture(scope="module")
def items():
    return held_out(12)


def test_synthetic_items_hide_the_truth_and_differ_only_as_asked(items) -> None:
    again, blank, stranger, silent = (
        held_out(12, **more)
        for more in ({}, {"reference": "blank"}, {"reference": "stranger"}, {"prompts": False})
    )
    assert any(item.prompt for item in items) and not any(item.prompt or item.colour for item in silent)
    for i, item in enumerate(items):
        hole = np.asarray(item.mask) > 0
        truth, image = np.asarray(item.truth), np.asarray(item.image)
        assert (truth[~hole] == image[~hole]).all() and (truth[hole] != image[hole]).any()
        assert again[i].subject.tobytes() == item.subject.tobytes()
        assert np.asarray(blank[i].subject).min() == 255 and np.array_equal(np.asarray(blank[i].truth), truth)
        assert stranger[i].subject.tobytes() == items[(i + 1) % 12].subject.tobytes()


def test_a_written_folder_is_read_back(items, tmp_path: Path) -> None:
    outline = items[0].subject.convert("L").point(lambda level: 255 * (level < 250))
    given = [replace(items[0], subject_mask=outline), *items[1:3]]
    write_items(given, tmp_path)
    for a, b in zip(given, read_items(tmp_path), strict=True):
        assert (a.name, a.prompt, a.colour) == (b.name, b.prompt, b.colour)
        for name in ("subject", "image", "mask", "subject_mask", "truth", "coverage"):
            mine, theirs = getattr(a, name), getattr(b, name)
            assert (mine is None) == (theirs is None), name
            assert mine is None or np.array_equal(np.asarray(mine), np.asarray(theirs)), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a list of items"),
        ("name,prompt,subject,image,mask\n", "lists nothing"),
        ("name,prompt,subject,image\na,b,c,d\n", "has no column mask"),
        ("name,prompt,subject,image,mask\na,b,s.png,i.png,m.png\na,b,s.png,i.png,m.png\n", "names a twice"),
        ("prompt,subject,image,mask,name\na,s.png,i.png,m.png\nb,s.png,i.png,m.png\n", "names  twice"),
        ("name,prompt,subject,image,mask\na,b,none.png,i.png,m.png\n", "subject of a: no such file"),
        ("name,prompt,subject,image,mask\na,b,s.png,i.png,\n", "mask of a: expected a file"),
        (
            "name,prompt,subject,image,mask\na,b,s.png,i.png,s.png\n",
            "mask of a: expected the size of the image of a",
        ),
    ],
)
def test_wrong_folders_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "s.png")
    Image.new("RGB", (9, 8), "red").save(tmp_path / "i.png")
    if text is not None:
        (tmp_path / LIST).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_items(tmp_path)

"""Folders of pairs: written, read back, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashbrush.integrations.evaluation.visual_icl.items import LIST, Pair, read_pairs, write_pairs


def test_a_written_folder_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)) for _ in range(6)]
    given = [
        Pair("a", *pictures[:2]),
        Pair("b", *pictures[2:4], ("a",)),
        Pair("c", *pictures[4:], ("b", "a")),
    ]
    write_pairs(given, tmp_path)
    for mine, theirs in zip(given, read_pairs(tmp_path), strict=True):
        assert (mine.name, mine.prompts) == (theirs.name, theirs.prompts)
        assert (
            mine.image.tobytes() == theirs.image.tobytes() and mine.truth.tobytes() == theirs.truth.tobytes()
        )


HEAD = "name,image,truth,prompts\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "folder: expected a list of pairs.*pairs.csv"),
        (HEAD, "lists nothing"),
        ("name,image,truth\na,s.png,s.png\n", "has no column prompts"),
        (HEAD + "a,s.png,s.png,\na,s.png,s.png,a\n", "names a twice"),
        (HEAD + "a,s.png,s.png,\n../b,s.png,s.png,a\n", r"expected names fit for a file.*'\.\./b'"),
        (HEAD + "a,s.png,s.png,\nb,s.png,s.png,z\n", "the prompt 'z' of b is not listed"),
        (HEAD + "a,s.png,s.png,a\n", "a is a prompt of itself"),
        (HEAD + "a,s.png,s.png,\n", "nothing to predict"),
        (HEAD + "a,none.png,s.png,\nb,s.png,s.png,a\n", "image of a: no such file"),
        (HEAD + "a,s.png,,\nb,s.png,s.png,a\n", "truth of a: expected a file, got nothing"),
        (HEAD + "a,s.png,i.png,\nb,s.png,s.png,a\n", "truth of a: expected the size of the image"),
    ],
)
def test_wrong_folders_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "s.png")
    Image.new("RGB", (9, 8), "red").save(tmp_path / "i.png")
    if text is not None:
        (tmp_path / LIST).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_pairs(tmp_path)

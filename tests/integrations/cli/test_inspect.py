"""flashbrush inspect on the tiny model: attention maps, mass and gains."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashbrush.integrations import AttentionMaps, InContextBrush

from ..command import flashbrush


def inspect(photos: dict[str, Path], folder: Path, *more: object) -> list[object]:
    given = [item for name, path in photos.items() for item in (f"--{name.replace('_', '-')}", path)]
    return [
        "inspect",
        *given,
        "--prompt",
        "a red cup, red",
        "-o",
        folder,
        "--steps",
        2,
        "--dtype",
        "float32",
        *more,
    ]


def test_inspect_writes_maps_mass_and_gains(
    photos: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "seen"
    corner = Image.new("L", Image.open(photos["image"]).size, 0)
    corner.paste(255, (22, 12, 30, 20))
    corner.save(tmp_path / "corner.png")
    words = ["--word", "red", "--word", "cup", "--region", f"corner={tmp_path / 'corner.png'}"]
    code, out, err = flashbrush(capsys, *inspect(photos, folder, *words, "--heads", "--every", 1))
    assert code == 0, err
    assert "maps.png" in out and Image.open(folder / "maps.png").size[0] > 800
    arrays = np.load(folder / "maps.npz")
    assert list(arrays["names"]) == ["red", "cup", "corner", "subject", "hole"]
    maps, mass, gains = arrays["maps"], arrays["mass"], arrays["gains"]
    layers, heads = 8, 6
    assert maps.shape == (2, layers, heads, 5, 16, 8) and mass.shape == (2, layers, heads, 3, 3)
    assert gains.shape == (2, layers, heads) and 1 <= gains.min() < gains.max() <= 1.2 + 1e-5
    # The target's attention to the subject, summed from the maps and by the operator.
    subject = maps[:, :, :, 3, 8:].sum((-1, -2))
    np.testing.assert_allclose(subject, mass[..., 2, 1], rtol=1e-4)
    np.testing.assert_allclose(mass.sum(-1), np.broadcast_to([16, 64, 64], mass.shape[:-1]), rtol=1e-4)
    with (folder / "mass.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * layers
    for row in rows:
        assert sum(float(row[f"to {name}"]) for name in ("prompt", "subject", "target")) == pytest.approx(
            1, abs=1e-4
        )


def test_recording_maps_does_not_change_the_result(pipe, photos: dict[str, Path]) -> None:
    asked = {name: str(path) for name, path in photos.items()} | {
        "seed": 3,
        "steps": 2,
        "width": 64,
        "height": 64,
    }
    maps = AttentionMaps(text={"cup": pipe.word_tokens("a cup", "cup")}, heads=False)
    plain, seen = pipe("a cup", **asked), pipe("a cup", **asked, maps=maps)
    assert torch.equal(plain.latents, seen.latents) or torch.allclose(plain.latents, seen.latents, atol=1e-4)
    assert plain.mass is None and seen.segments == ("prompt", "subject", "target")
    assert len(maps.maps) == 2 * 8 and maps.maps[0].values.shape == (1, 1, 1, 128)
    hole = pipe("a cup", **asked, hole_only=True, maps=AttentionMaps(text={"cup": [1]}))
    assert hole.segments[-1] == "hole" and hole.mass.shape[-2:] == (4, 4)


def test_segments_are_the_names_of_the_control_s_rows() -> None:
    from flashbrush.integrations.diffusers import Layer, Step

    hole = torch.zeros(8, dtype=torch.bool)
    hole[6] = True
    for method in (
        InContextBrush(),
        InContextBrush(subject_first=False),
        InContextBrush(count_padding=False, prompt_tokens=2),
        InContextBrush(hole=hole),
    ):
        control = method.plan(Layer(0, "double", None, 2, 8, 5, 8), Step(0)).control
        assert control is not None and control.rows.names == method.segments


def test_region_tokens_are_those_that_show_any_part_of_it(pipe, tmp_path: Path) -> None:
    """Panels of 64 pixels have 8 x 8 tokens; the photo's panel is the second."""
    size = (64, 64)
    picture, mask, region = Image.new("RGB", size), Image.new("L", size, 0), Image.new("L", size, 0)
    mask.paste(255, (16, 16, 48, 48))
    region.paste(255, (9, 0, 15, 8))
    asked = {"image": picture, "mask": mask, "width": 64, "height": 64}
    assert pipe.region_tokens(region, **asked) == [64 + 1]
    assert pipe.region_tokens(None, **asked) == list(range(64, 128))
    assert pipe.region_tokens(mask, **asked) == [
        64 + 8 * row + column for row in range(2, 6) for column in range(2, 6)
    ]
    away = Image.new("L", size, 0)
    away.putpixel((0, 0), 255)
    with pytest.raises(ValueError, match="region: the model sees nothing of it"):
        pipe.region_tokens(away, **asked, padding_mask_crop=0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--word", "blue"], "'blue' is not in the prompt"),
        (["--region", "corner"], "region: expected NAME=FILE"),
        (["--region", "hole=corner.png"], "none subject or hole"),
        (["--region", "corner=nowhere.png"], "nowhere.png"),
        (["--word", "red", "--region", "red={mask}"], "expected other names"),
    ],
    ids=["a word", "a region", "a name of ours", "a file", "names"],
)
def test_wrong_input_is_refused(
    more: list[str], said: str, photos: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [one.format(**photos) for one in more]
    code, _, err = flashbrush(capsys, *inspect(photos, tmp_path / "seen", *more))
    assert code == 2 and said in err.splitlines()[-1]
    assert not (tmp_path / "seen").exists()

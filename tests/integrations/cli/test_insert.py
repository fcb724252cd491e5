"""flashbrush insert: the photo outside of the mask stays, and every option has an effect."""

from __future__ import annotations

import numpy as np
from PIL import Image

import flashbrush as fb

from ..command import flashbrush, insert_arguments


def test_the_photo_outside_of_the_mask_stays(capsys, photos, checkpoint, tmp_path) -> None:
    code, out, err = flashbrush(
        capsys, *insert_arguments(photos, checkpoint, tmp_path, report=tmp_path / "report.png")
    )
    assert code == 0, err
    photo, mask = np.asarray(Image.open(photos["image"])), np.asarray(Image.open(photos["mask"]))
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert (picture[mask == 0] == photo[mask == 0]).all() and (picture[mask > 0] != photo[mask > 0]).any()
    assert Image.open(tmp_path / "report.png").size[0] > 1000
    assert "out.png" in out and "report.png" in out


def test_every_option_changes_the_picture(capsys, photos, checkpoint, tmp_path) -> None:
    def picture(**changes: object) -> bytes:
        path = tmp_path / "knob.png"
        code, _, err = flashbrush(
            capsys, *insert_arguments(photos, checkpoint, tmp_path, output=path, **changes)
        )
        assert code == 0, err
        return Image.open(path).tobytes()

    first = picture()
    assert picture() == first
    knobs = {
        "alpha_prompt": 0.9,
        "alpha_subject": 0.9,
        "gain_span": 0.8,
        "gain_norm": "softmax",
        "seed": 5,
        "guidance": 2.0,
        "prompt": "a blue dog",
        "padding_mask_crop": 3,
        "subject_fill": 0.5,
    }
    for knob, value in knobs.items():
        assert picture(**{knob: value}) != first, knob


def test_prints_the_size_that_the_model_saw(capsys, photos, checkpoint, tmp_path) -> None:
    code, out, _ = flashbrush(capsys, *insert_arguments(photos, checkpoint, tmp_path, width=32))
    assert code == 0 and "64x48" in out and "32x24" in out
    assert Image.open(tmp_path / "out.png").size == (64, 48)


def test_photos_are_turned_upright(capsys, photos, checkpoint, tmp_path) -> None:
    upright = Image.open(photos["image"])
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    turned.save(tmp_path / "camera.png", exif=exif)
    code, _, err = flashbrush(
        capsys, *insert_arguments(photos, checkpoint, tmp_path, image=tmp_path / "camera.png")
    )
    assert code == 0, err
    mask = np.asarray(Image.open(photos["mask"]))
    assert (np.asarray(Image.open(tmp_path / "out.png"))[mask == 0] == np.asarray(upright)[mask == 0]).all()


def test_without_a_model_the_tiny_one_is_used(capsys, photos, checkpoint, tmp_path) -> None:
    code, out, err = flashbrush(capsys, *insert_arguments(photos, checkpoint, tmp_path, model=None))
    assert code == 0, err
    assert "no --model is given" in out and str(fb.tiny_fill()) in out and "64x64" in out
    photo, mask = np.asarray(Image.open(photos["image"])), np.asarray(Image.open(photos["mask"]))
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert (picture[mask == 0] == photo[mask == 0]).all() and (picture[mask > 0] != photo[mask > 0]).any()
    said = insert_arguments(photos, checkpoint, tmp_path, width=32, output=tmp_path / "small.png", model=None)
    code, out, _ = flashbrush(capsys, *said)
    assert code == 0 and "32x64" in out


def test_an_error_while_writing_leaves_no_file(capsys, photos, checkpoint, tmp_path, monkeypatch) -> None:
    from flashbrush.integrations.cli.shared import figures

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(figures, "insertion_report", fail)
    folder = tmp_path / "work"
    folder.mkdir()
    code, _, err = flashbrush(
        capsys, *insert_arguments(photos, checkpoint, folder, report=folder / "report.png")
    )
    assert code == 2 and "disk full" in err and list(folder.iterdir()) == []

"""flashbrush sweep: differences to the base setting."""

from __future__ import annotations

import csv

from PIL import Image

from ..command import STEPS, conditions, flashbrush


def test_sweep_writes_table_plot_and_conditions(capsys, tmp_path) -> None:
    output = tmp_path / "sweep"
    command = [
        "sweep",
        "-o",
        output,
        "--count",
        "2",
        "--axis",
        "alpha_subject=0,0.9",
        "--axis",
        "blend=0,1",
        *STEPS,
    ]
    code, out, err = flashbrush(capsys, *command)
    assert code == 0, err
    with (output / "sweep.csv").open() as file:
        rows = {(row["axis"], row["value"], row["measure"]): row for row in csv.DictReader(file)}
    assert float(rows["alpha_subject", "0", "pattern"]["difference"]) == 0
    assert float(rows["alpha_subject", "0.9", "pattern"]["difference"]) != 0
    assert float(rows["blend", "False", "psnr_outside"]["difference"]) != 0
    assert ("adaptive", "alpha_subject by palette", "pattern") in rows and "alpha_subject" in out
    assert Image.open(output / "sweep.png").size[0] > 500
    said = conditions(output)
    assert said["items"] == {"reference": 2, "contradiction": 2} and said["axis"] == [
        "alpha_subject=0,0.9",
        "blend=0,1",
    ]

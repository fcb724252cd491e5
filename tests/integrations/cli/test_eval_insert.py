"""flashbrush eval insert: tables, pictures and conditions."""

from __future__ import annotations

import csv

import pytest
from PIL import Image

from flashbrush.integrations.evaluation.insertion.items import held_out, write_items

from ..command import STEPS, conditions, flashbrush


def test_eval_insert_writes_tables_pictures_and_conditions(capsys, tmp_path) -> None:
    pytest.importorskip("torchmetrics")
    code, out, err = flashbrush(capsys, "eval", "insert", "-o", tmp_path / "made", "--count", "2", *STEPS)
    assert code == 0, err
    with (tmp_path / "made" / "table.csv").open() as file:
        table = {row.pop("measure"): row for row in csv.DictReader(file)}
    assert set(table["pattern"]) == {
        "own reference",
        "blank reference",
        "stranger reference",
        "contradiction",
    }
    assert {"psnr_hole", "psnr_outside", "pattern", "palette", "fid"} <= set(table) and "pattern" in out
    with (tmp_path / "made" / "items.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["sort"] for row in rows} == set(table["pattern"])
    assert Image.open(tmp_path / "made" / "pictures.png").size[0] > 200
    said = conditions(tmp_path / "made")
    assert (
        said["items"] == dict.fromkeys(table["pattern"], 2)
        and said["model"] == "tiny_fill"
        and said["freedom"] == 0
    )
    assert (said["steps"], said["guidance"], said["seed"], said["device"]) == (2, 30, 0, "cpu")

    write_items(held_out(2), tmp_path / "photos")
    command = [
        "eval",
        "insert",
        tmp_path / "photos",
        "-o",
        tmp_path / "own",
        "--alpha-subject",
        "0.5",
        *STEPS,
    ]
    code, _, err = flashbrush(capsys, *command)
    assert code == 0, err
    with (tmp_path / "own" / "items.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["alpha_subject"] for row in rows] == ["0.5", "0.5"] and float(rows[0]["psnr_outside"]) == 100
    said = conditions(tmp_path / "own")
    assert (
        said["items"] == {"all": 2}
        and said["folder"] == "photos"
        and said["alpha_subject"] == 0.5
        and "freedom" not in said
    )

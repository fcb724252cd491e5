"""Sweeps of one knob at a time: settings, the table, the plot, and wrong axes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from flashbrush.integrations.evaluation.csv_files import write_csv
from flashbrush.integrations.evaluation.insertion.evaluate import Setting
from flashbrush.integrations.evaluation.insertion.sweep import parse_axis, plot, settings, table

from .outcomes import outcomes


def test_table_and_plot_compare_settings_with_the_base(tmp_path: Path) -> None:
    named = settings(
        dict([parse_axis("alpha_subject=0,0.5"), parse_axis("grow=-1,1")]), {"code": Setting(0.3, 0.3, 0.2)}
    )
    assert list(named) == [
        ("base", ""),
        ("alpha_subject", "0"),
        ("alpha_subject", "0.5"),
        ("grow", "-1"),
        ("grow", "1"),
        ("setting", "code"),
    ]
    made = []
    for i, setting in enumerate(dict.fromkeys(named.values())):
        for name, shift in (("reference_0000", 0.0), ("reference_0001", 1.0), ("contradiction_0000", 0.0)):
            for outcome in outcomes(setting, {(name, 7): i + shift}):
                outcome.measured.update(palette=-i, colour=float(i > 1))
                made.append(outcome)
    rows = table(made, named)
    found = {(row["axis"], row["value"], row["items"], row["measure"]): row for row in rows}
    row = found["alpha_subject", "0.5", "reference", "pattern"]
    assert (row["mean"], row["difference"], row["difference_error"], row["n"]) == (1.5, 1.0, 0.0, 2)
    assert found["setting", "code", "contradiction", "colour"]["mean"] == 1.0
    assert found["adaptive", "alpha_subject by palette", "reference", "pattern"]["difference"] == 0.0
    write_csv(tmp_path / "sweep.csv", rows)
    with (tmp_path / "sweep.csv").open() as file:
        assert [(row["axis"], row["value"]) for row in csv.DictReader(file)] == [
            (row["axis"], row["value"]) for row in rows
        ]
    figure = plot(rows, "a title")
    figure.savefig(tmp_path / "sweep.png")
    assert [axes.get_xlabel() for axes in figure.axes[-4:]] == [
        "alpha_subject",
        "grow",
        "setting",
        "adaptive",
    ]
    lines = figure.axes[0].lines[0]
    assert list(lines.get_xdata()) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("size=1", "axis: expected one of"),
        ("grow", "axis: expected grow=number"),
        ("grow=0.5", "whole numbers"),
        ("alpha_prompt=a,b", "axis: expected alpha_prompt=number"),
    ],
)
def test_wrong_axes_are_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_axis(text)

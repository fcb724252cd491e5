"""Running and measuring insertions: seeds, settings and batches; summaries and sweeps of the outcomes."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from flashbrush.integrations.evaluation.csv_files import write_csv
from flashbrush.integrations.evaluation.insertion.evaluate import Outcome, Setting, evaluate
from flashbrush.integrations.evaluation.insertion.items import Item, held_out
from flashbrush.integrations.evaluation.insertion.summary import best, estimate
from flashbrush.integrations.evaluation.insertion.sweep import parse_axis, plot, settings, table

PANEL = {"width": 64, "height": 64, "steps": 1}


def outcomes(
    setting: Setting, values: dict[tuple[str, int], float], measure: str = "pattern"
) -> list[Outcome]:
    blank = Image.new("RGB", (4, 4))
    made = []
    for (name, seed), value in values.items():
        item = Item(name, "", blank, blank, blank.convert("L"))
        made.append(Outcome(item, seed, setting, blank, {measure: value}))
    return made


def test_settings_share_their_seeds_and_change_the_picture(pipe) -> None:
    items = held_out(3)
    base = Setting()
    changed = [
        Setting(alpha_prompt=0.9),
        Setting(alpha_subject=0.9),
        Setting(gain_span=0.9),
        Setting(blend=False),
        Setting(alpha_subject=0.9, hole_only=True),
        Setting(grow=2),
        Setting(grow=-2),
    ]
    made = evaluate(
        pipe,
        items,
        [base, *changed],
        options=lambda _: PANEL,
        repeats=2,
        batch=2,
        paste_back=False,
        progress=False,
    )
    assert len(made) == 3 * 2 * 8
    by_key = {(o.setting, o.item.name, o.seed): o for o in made}
    seeds = {(o.item.name, o.seed) for o in made}
    assert seeds == {(item.name, seed + i) for i, item in enumerate(items) for seed in (0, 3)}
    assert {o.kind for o in made} == {"reference"}
    for setting in changed:
        assert any(
            by_key[(setting, *key)].picture.tobytes() != by_key[(base, *key)].picture.tobytes()
            for key in seeds
        ), setting
    alone = evaluate(
        pipe, items[1:2], [base], options=lambda _: PANEL, seed=4, paste_back=False, progress=False
    )
    near = np.asarray(alone[0].picture).astype(int) - np.asarray(by_key[base, items[1].name, 4].picture)
    assert np.abs(near).max() <= 2  # another batch size rounds sums differently
    row = alone[0].row()
    assert (
        row["item"] == items[1].name
        and row["seed"] == 4
        and {"pattern", "psnr_hole", "psnr_outside"} <= set(row)
    )


def test_items_are_batched_by_size(pipe) -> None:
    one, two = held_out(2)
    large = replace(
        two, image=two.image.resize((80, 64)), mask=two.mask.resize((80, 64)), truth=None, coverage=None
    )
    made = evaluate(pipe, [one, large], [Setting()], options=lambda _: {"steps": 1}, progress=False)
    assert [o.picture.size for o in made] == [(64, 64), (80, 64)]
    outside = np.asarray(large.mask) == 0
    assert (np.asarray(made[1].picture)[outside] == np.asarray(large.image)[outside]).all()


def test_masks_grow_and_shrink() -> None:
    mask = Image.new("L", (16, 16))
    mask.paste(255, (6, 6, 10, 10))
    assert Setting(grow=2).mask(mask).getbbox() == (4, 4, 12, 12)
    assert Setting(grow=-1).mask(mask).getbbox() == (7, 7, 9, 9)
    assert Setting().mask(mask) is mask
    with pytest.raises(ValueError, match="grow: nothing is left"):
        Setting(grow=-3).mask(mask)


def test_without_items_or_settings_it_raises(pipe) -> None:
    with pytest.raises(ValueError, match="expected items and settings, got 0 and 1"):
        evaluate(pipe, [], [Setting()], options=lambda _: PANEL)


def test_estimates_by_hand() -> None:
    base = outcomes(Setting(), {("a", 0): 0.0, ("a", 1): 1.0, ("b", 0): 2.0, ("b", 1): 4.0})
    other = outcomes(Setting(0.5), {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 2.5, ("b", 1): 4.0})
    mean = estimate(base, "pattern")
    assert mean.mean == 1.75 and mean.error == pytest.approx(1.25) and mean.items == 2
    change = estimate(other, "pattern", base)
    assert change.mean == pytest.approx(0.875) and change.error == pytest.approx(0.625)
    assert math.isnan(estimate(base, "colour").mean) and estimate(base, "colour").items == 0
    with pytest.raises(ValueError, match="base: it has no pattern of b with seed 1"):
        estimate(other, "pattern", base[:3])
    infinite = outcomes(Setting(), {("a", 0): math.nan, ("b", 0): 3.0})
    assert estimate(infinite, "pattern")[0] == 3.0 and math.isnan(estimate(infinite, "pattern").error)


def test_the_rule_takes_the_best_setting_of_each_image() -> None:
    none, some = Setting(), Setting(alpha_subject=0.5)
    made = outcomes(none, {("a", 0): 0.2, ("b", 0): 0.9}, "palette") + outcomes(
        some, {("a", 0): 0.3, ("b", 0): 0.1}, "palette"
    )
    assert {o.item.name: o.setting for o in best(made, [none, some], "palette")} == {"a": some, "b": none}
    assert {o.setting for o in best(made, [none], "palette")} == {none}


def test_tables_and_plots(tmp_path: Path) -> None:
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
def test_wrong_axes(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_axis(text)

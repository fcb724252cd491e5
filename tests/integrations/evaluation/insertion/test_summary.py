"""Means, standard errors and paired differences of outcomes, against values by hand."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from flashbrush.integrations.evaluation.insertion.evaluate import Setting
from flashbrush.integrations.evaluation.insertion.summary import best, estimate

from .outcomes import outcomes


def test_estimates_equal_values_by_hand() -> None:
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

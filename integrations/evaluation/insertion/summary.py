"""Means and standard errors of outcomes; differences between settings are paired by item and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .evaluate import Outcome, Setting


class Estimate(NamedTuple):
    """A mean over items, whose seeds are averaged first, its standard error, and the number of items."""

    mean: float
    error: float
    items: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


def estimate(outcomes: Iterable[Outcome], measure: str, base: Sequence[Outcome] | None = None) -> Estimate:
    """The mean of a measure, or of its differences to `base`.

    Args:
        outcomes: those to average; without the measure, or where it is not finite, they are left out.
        measure: its name.
        base: outcomes to subtract, paired by item and seed; None: nothing is subtracted.

    Raises:
        ValueError: an outcome has no partner in the base.
    """
    reference = None if base is None else {(o.item.name, o.seed): o.measured.get(measure) for o in base}
    by_item: dict[str, list[float]] = {}
    for outcome in outcomes:
        value, key = outcome.measured.get(measure), (outcome.item.name, outcome.seed)
        if value is None or not math.isfinite(value):
            continue
        if reference is not None:
            if (other := reference.get(key)) is None:
                raise ValueError(f"base: it has no {measure} of {outcome.item.name} with seed {outcome.seed}")
            value -= other
        by_item.setdefault(outcome.item.name, []).append(value)
    means = np.array([np.mean(values) for values in by_item.values()])
    error = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else float("nan")
    return Estimate(float(means.mean()) if len(means) else float("nan"), error, len(means))


def best(outcomes: Sequence[Outcome], settings: Sequence[Setting], measure: str) -> list[Outcome]:
    """For each item and seed, the outcome with the highest measure of all settings; the first of equal ones.

    With a measure that needs no truth, this chooses a setting for each image.
    """
    found: dict[tuple[str, int], Outcome] = {}
    for setting in settings:
        for outcome in (o for o in outcomes if o.setting == setting and measure in o.measured):
            key = outcome.item.name, outcome.seed
            if key not in found or outcome.measured[measure] > found[key].measured[measure]:
                found[key] = outcome
    return list(found.values())

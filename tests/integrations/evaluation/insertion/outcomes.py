"""Outcomes with given measures, for the tests of summaries and sweeps."""

from __future__ import annotations

from PIL import Image

from flashbrush.integrations.evaluation.insertion.evaluate import Outcome, Setting
from flashbrush.integrations.evaluation.insertion.items import Item


def outcomes(
    setting: Setting, values: dict[tuple[str, int], float], measure: str = "pattern"
) -> list[Outcome]:
    blank = Image.new("RGB", (4, 4))
    made = []
    for (name, seed), value in values.items():
        item = Item(name, "", blank, blank, blank.convert("L"))
        made.append(Outcome(item, seed, setting, blank, {measure: value}))
    return made

"""Sweeps of one knob at a time from the stock model; changes are paired by item and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from .evaluate import Outcome, Setting
from .summary import Estimate, best, estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES: dict[str, tuple[Any, ...]] = {
    "alpha_prompt": (-0.3, 0.0, 0.1, 0.3, 0.5, 1.0, 2.0),
    "alpha_subject": (-0.3, 0.0, 0.1, 0.3, 0.5, 1.0),
    "gain_span": (0.0, 0.2, 0.5),
    "grow": (-4, -2, 0, 2, 4),
}
# Settings of several knobs: hole_only has an effect only with a weight, and shows best without blending.
MORE: dict[str, Setting] = {
    "blend off": Setting(blend=False),
    "0.5, blend off": Setting(alpha_subject=0.5, blend=False),
    "0.5, hole only, blend off": Setting(alpha_subject=0.5, hole_only=True, blend=False),
    "0.5, hole only": Setting(alpha_subject=0.5, hole_only=True),
    "released code": Setting(0.3, 0.3, 0.2),
}
RULE = "palette"  # the measure by which "adaptive" chooses alpha_subject for each image; it needs no truth
# (sort of items, measure)
JUDGED = (
    ("reference", "psnr_hole"),
    ("reference", "pattern"),
    ("reference", "palette"),
    ("reference", "psnr_outside"),
    ("contradiction", "colour"),
)
INK, LINE, BASE = "#333333", "#7a3b8f", "#bbbbbb"


def parse_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Parse an axis: "alpha_prompt=0,0.3" gives ("alpha_prompt", (0.0, 0.3)).

    Raises:
        ValueError: no such knob, or a value of the wrong type.
    """
    name, _, values = text.partition("=")
    kinds = {field.name: type(field.default) for field in fields(Setting)}
    if name not in kinds:
        raise ValueError(f"axis: expected one of {', '.join(kinds)}, got {name!r}")
    try:
        parsed = [float(value) for value in values.split(",")]
    except ValueError as error:
        raise ValueError(f"axis: expected {name}=number,number..., got {text!r}") from error
    if kinds[name] is not float and any(value % 1 for value in parsed):
        raise ValueError(f"axis: expected whole numbers for {name}, got {values}")
    return name, tuple(kinds[name](value) for value in parsed)


def settings(
    axes: Mapping[str, Sequence[Any]], more: Mapping[str, Setting]
) -> dict[tuple[str, str], Setting]:
    """Settings by (axis, value as text), each with one knob changed from Setting(), which is ("base", "").

    Args:
        axes: values by knob.
        more: further settings by name, listed as ("setting", name).
    """
    found = {("base", ""): Setting()}
    for axis, values in axes.items():
        found |= {
            (axis, f"{value:g}" if not isinstance(value, bool) else str(value)): replace(
                Setting(), **{axis: value}
            )
            for value in values
        }
    return found | {("setting", name): setting for name, setting in more.items()}


def table(outcomes: Sequence[Outcome], named: Mapping[tuple[str, str], Setting]) -> list[dict[str, Any]]:
    """A row for each setting and measure: mean, change against the base, standard errors, number of items.

    With several values of alpha_subject, "adaptive" is the rule that takes for each image the value whose
    result has the highest RULE.

    Args:
        outcomes: of all settings.
        named: the settings by (axis, value), as from settings().
    """
    by_setting: dict[Setting, list[Outcome]] = {}
    for outcome in outcomes:
        by_setting.setdefault(outcome.setting, []).append(outcome)
    groups = {key: by_setting[setting] for key, setting in named.items()}
    chosen = [setting for (axis, _), setting in named.items() if axis == "alpha_subject"]
    if len(chosen) > 1:
        groups["adaptive", f"alpha_subject by {RULE}"] = best(outcomes, chosen, RULE)
    rows = []
    for (axis, value), group in groups.items():
        for kind, measure in _judged(outcomes):
            own, base = ([o for o in some if o.kind == kind] for some in (group, groups["base", ""]))
            mean, change = estimate(own, measure), estimate(own, measure, base)
            if not mean.items:
                continue
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    "items": kind,
                    "measure": measure,
                    "mean": mean.mean,
                    "error": mean.error,
                    "difference": change.mean,
                    "difference_error": change.error,
                    "n": mean.items,
                }
            )
    return rows


def _judged(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """(sort, measure) of the rows: JUDGED where the items are of those sorts, else everything measured."""
    kinds = list(dict.fromkeys(o.kind for o in outcomes))
    if set(kinds) <= {kind for kind, _ in JUDGED}:
        return [(kind, measure) for kind, measure in JUDGED if kind in kinds]
    return [
        (kind, name)
        for kind in kinds
        for name in dict.fromkeys(n for o in outcomes if o.kind == kind for n in o.measured)
    ]


def plot(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Changes against the base with their standard errors: a column for each axis, a row for each measure."""
    from matplotlib.figure import Figure

    axes = [name for name in dict.fromkeys(row["axis"] for row in rows) if name != "base"]
    judged = list(dict.fromkeys((row["items"], row["measure"]) for row in rows))
    figure = Figure(figsize=(3 * len(axes), 1.9 * len(judged) + 0.6), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, color=INK)
    grid = figure.subplots(len(judged), len(axes), squeeze=False, sharey="row", sharex="col")
    for line, (kind, measure) in zip(grid, judged, strict=True):
        for place, axis in zip(line, axes, strict=True):
            some = [
                row for row in rows if (row["axis"], row["items"], row["measure"]) == (axis, kind, measure)
            ]
            change = [Estimate(row["difference"], row["difference_error"], row["n"]) for row in some]
            numbers = [_number(row["value"]) for row in some]
            named = any(math.isnan(number) for number in numbers)
            x = list(range(len(some))) if named else numbers
            bars = [0 if math.isnan(c.error) else c.error for c in change]
            place.errorbar(
                x,
                [c.mean for c in change],
                bars,
                color=LINE,
                marker="o",
                markersize=3.5,
                capsize=2,
                linestyle="none" if named else "-",
            )
            place.axhline(0, color=BASE, linewidth=0.8, zorder=0)
            if named:
                place.set_xticks(x, [row["value"] for row in some], rotation=30, ha="right")
            place.tick_params(labelsize=8, colors=INK)
            place.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(f"{measure}\n({kind})" if kind else measure, fontsize=9, color=INK)
    for place, axis in zip(grid[-1], axes, strict=True):
        place.set_xlabel(axis, color=INK)
    return figure


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

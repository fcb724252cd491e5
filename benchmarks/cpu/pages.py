"""The figures in README.md and docs/benchmarks.md, generated from the committed measurements."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

PAGES = ("README.md", "docs/benchmarks.md")
COMMAND = "python -m flashbrush.benchmarks.cpu.table --pages"
MARKER = re.compile(r"<!-- figures: (?P<name>[\w ]+?)(?P<how> \(.*\))? -->")

# Rows of the summary, as they are named in the measurement.
SUMMARY_SHAPES = ("(1,8,1024,64)", "(1,24,1536,128)", "(1,24,5120,128)")
ISAS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def update(page: Path, results: Path) -> bool:
    """Rewrite what stands between the page's markers; True where that changed it.

        <!-- figures: NAME (COMMAND) -->
        ...
        <!-- figures: end -->

    Args:
        page: a Markdown file with at least one pair of markers.
        results: the folder of the measurements.

    Raises:
        ValueError: no marker, markers that are not in pairs, or a name that is not in GENERATED.
    """
    text = page.read_text()
    new, position, opened = "", 0, ""
    for found in MARKER.finditer(text):
        name = found["name"]
        if (name == "end") is not bool(opened) or (name != "end" and name not in GENERATED):
            raise ValueError(f"{page.name}: unexpected marker {found[0]}")
        if name == "end":
            function, file = GENERATED[opened]
            new += section(function, results / file)
            opened = ""
        else:
            new += text[position : found.start()]
            opened = name
        new += found[0]
        position = found.end()
    if opened or not position:
        raise ValueError(f"{page.name}: expected pairs of figures markers")
    new += text[position:]
    if new != text:
        page.write_text(new)
    return new != text


def section(function: Callable[[dict], list[str]], measurement: Path) -> str:
    """The Markdown that `function` makes of a measurement; a line break where there is none."""
    if not measurement.exists():
        return "\n"
    lines = function(json.loads(measurement.read_text()))
    return "\n".join(["", "", *lines, "", ""]) if lines else "\n"


def summary(results: dict) -> list[str]:
    """A few rows of the attention's table, for the README."""
    rows = [r for r in _forward(results) if r["shape"]["size"] in SUMMARY_SHAPES]
    if not rows:
        return []
    names = ("sdpa/plain", "controlled/plain", "eager/controlled")
    columns = ("batch, heads, tokens, dim", "dtype", "torch SDPA / plain", "controlled / plain")
    lines = [_conditions(results), "", *_header((*columns, "eager / controlled", "extra MB: eager", "ours"))]
    for row in rows:
        extra = [_cell(row["memory"], n, "extra", 1e-6, "") for n in ("eager", "controlled")]
        ratios = [_ranged(row["ratios"].get(name)) for name in names]
        lines.append(_row([row["shape"]["size"], row["dtype"], *ratios, *extra]))
    return [*lines, *_others(results["rows"])]


def attention(results: dict) -> list[str]:
    """Every row of the attention's table, and the FLUX layer and the backward pass in a sentence each."""
    rows = _forward(results)
    if not rows:
        return []
    columns = (
        "batch, heads, tokens, dim",
        "dtype",
        "torch SDPA",
        "ours, plain",
        "ours, controlled",
        "SDPA / plain",
        "controlled / plain",
        "eager / controlled",
        "composed / controlled",
        "plain, of GEMM rate",
        "extra MB: eager",
        "ours",
    )
    lines = [_conditions(results), "", *_header(columns)]
    for row in rows:
        times = [_cell(row["seconds"], n, "median", 1e3, " ms") for n in ("sdpa", "plain", "controlled")]
        names = ("sdpa/plain", "controlled/plain", "eager/controlled", "composed/controlled")
        ratios = [_ranged(row["ratios"].get(name)) for name in names]
        extra = [_cell(row["memory"], n, "extra", 1e-6, "") for n in ("eager", "controlled")]
        lines.append(_row([row["shape"]["size"], row["dtype"], *times, *ratios, of_gemm(row) or "-", *extra]))
    return [*lines, *_others(results["rows"])]


def methods(results: dict) -> list[str]:
    """One attention layer with each method, against the same layer with the attention map in memory."""
    lines = [_conditions(results), "", *_header(("layer", "ours", "other", "time of other", "other / ours"))]
    count = len(lines)
    for row in results["rows"]:
        label = {"unet": "SD-VICL, "}.get(row["section"], "")
        for name, ratio in row["ratios"].items():
            other, _, ours = name.partition("/")
            if other == ours or other == "stock" or ours == "plain" or "rate" in name:
                continue
            what = other.removesuffix(ours).strip()
            times = [_cell(row["seconds"], n, "median", 1e3, " ms") for n in (ours, other)]
            lines.append(_row([label + ours, times[0], what, times[1], _ranged(ratio)]))
    return lines if len(lines) > count else []


GENERATED: dict[str, tuple[Callable[[dict], list[str]], str]] = {
    "summary": (summary, "cpu.json"),
    "attention": (attention, "cpu.json"),
    "methods": (methods, "methods.json"),
}


def _forward(results: dict) -> list[dict]:
    return [r for r in results["rows"] if r["section"] == "forward" and "plain" in r["seconds"]]


def _conditions(results: dict) -> str:
    about, conditions = results["machine"], results["conditions"]
    isa = [flag for flag in about["isa"] if flag in ISAS]
    return (
        f"{about['cpu']} ({', '.join(isa)}), {conditions['threads']} threads, torch {about['torch']}, commit "
        f"{about['commit']}, {about['date']}. Medians of {conditions['repeats']} rounds in which all "
        "contestants run in random order. A ratio is the median of paired ratios, with their range."
    )


def _others(rows: list[dict]) -> list[str]:
    """The layer and the backward pass in a sentence each, at the largest shape measured."""

    def largest(section: str, ratio: str) -> dict | None:
        found = [
            r for r in rows if r["section"] == section and r["dtype"] == "bfloat16" and ratio in r["ratios"]
        ]
        return max(
            found, key=lambda r: r["shape"]["rows"] * r["shape"]["heads"] * r["shape"]["dim"], default=None
        )

    lines = []
    if row := largest("layer", "controlled/stock"):
        lines += [
            "",
            "All of a FLUX layer between its q, k, v projections and its output projections (norms, "
            "joining, RoPE, attention, gain), controlled, takes "
            f"{_ranged(row['ratios']['controlled/stock'])} of the time of diffusers' stock processor "
            f"without control, at {row['shape']['size']} in bfloat16.",
        ]
    if row := largest("forward and backward", "sdpa/plain"):
        lines += [
            "",
            f"Forward and backward, plain: torch SDPA takes {_ranged(row['ratios']['sdpa/plain'])} times "
            f"as long, at {row['shape']['size']} in bfloat16.",
        ]
    return lines


def of_gemm(row: dict) -> str:
    """The plain call's rate as a share of the better of the GEMM rates measured beside it."""
    shares = [r["median"] for name, r in row["ratios"].items() if name.startswith("plain rate/gemm")]
    return f"{min(shares):.2f}" if shares else ""


def figure(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def _header(columns: tuple[str, ...]) -> list[str]:
    return [_row(list(columns)), "|---|---|" + "---:|" * (len(columns) - 2)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cells: dict, name: str, field: str, factor: float, unit: str) -> str:
    return figure(factor * cells[name][field]) + unit if isinstance(cells.get(name), dict) else "-"


def _ranged(ratio: dict | None) -> str:
    return (
        "-"
        if ratio is None
        else f"**{figure(ratio['median'])}** ({figure(ratio['min'])}-{figure(ratio['max'])})"
    )

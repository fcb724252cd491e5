"""The README's figures, generated from the committed measurement: none is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

BEGIN = "<!-- measurements: begin (python -m flashbrush.benchmarks.cpu.table --readme) -->"
END = "<!-- measurements: end -->"


def update(page: Path, measurement: Path) -> bool:
    """Rewrite the part of the page between the markers; True where that changed it.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{page.name}: expected the two measurement markers once each, in order")
    new = before + BEGIN + "\n" + section(measurement) + END + after
    if new != text:
        page.write_text(new)
    return new != text


def section(measurement: Path) -> str:
    """Markdown; empty where nothing was measured."""
    if not measurement.exists():
        return ""
    results = json.loads(measurement.read_text())
    rows = [r for r in results["rows"] if r["section"] == "forward" and "plain" in r["seconds"]]
    if not rows:
        return ""
    about, conditions = results["machine"], results["conditions"]
    isa = [flag for flag in about["isa"] if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
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
    lines = [
        "",
        f"{about['cpu']} ({', '.join(isa)}), {conditions['threads']} threads, torch {about['torch']}, "
        f"commit {about['commit']}, {about['date']}. Medians of {conditions['repeats']} rounds in which all "
        "contestants run in random order; ratios are medians of paired ratios, with their range. Every result was "
        "checked against float64 first.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---|---|" + "---:|" * (len(columns) - 2),
    ]
    for row in rows:
        times = [_cell(row["seconds"], n, "median", 1e3, " ms") for n in ("sdpa", "plain", "controlled")]
        names = ("sdpa/plain", "controlled/plain", "eager/controlled", "composed/controlled")
        ratios = [_ranged(row["ratios"].get(name)) for name in names]
        extra = [_cell(row["memory"], n, "extra", 1e-6, "") for n in ("eager", "controlled")]
        cells = [row["shape"]["size"], row["dtype"], *times, *ratios, of_gemm(row) or "-", *extra]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Controlled is In-Context Brush (weight, mass, head gain); for 4096 x 77, a weight on each of 77 one-token",
        "segments. Eager is the form of the methods' code, with the map in memory. Extra memory is the peak beyond",
        "inputs and output.",
        *_others(results["rows"]),
        "All samples: [benchmarks/results/cpu.json](benchmarks/results/cpu.json).",
        "",
    ]
    return "\n".join(lines)


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
        lines.append(
            "Everything between a FLUX layer's q, k, v and its output projections (norms, joining, RoPE, attention, "
            f"gain), controlled, takes {_ranged(row['ratios']['controlled/stock'])} of diffusers' stock processor "
            f"without control, at {row['shape']['size']} in bfloat16."
        )
    if row := largest("forward and backward", "sdpa/plain"):
        lines.append(
            f"Forward and backward, plain: torch SDPA takes {_ranged(row['ratios']['sdpa/plain'])} times as long, at "
            f"{row['shape']['size']} in bfloat16."
        )
    return lines


def of_gemm(row: dict) -> str:
    """The plain call's rate as a share of the better of the GEMM rates measured beside it."""
    shares = [r["median"] for name, r in row["ratios"].items() if name.startswith("plain rate/gemm")]
    return f"{min(shares):.2f}" if shares else ""


def figure(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def _cell(cells: dict, name: str, field: str, factor: float, unit: str) -> str:
    return figure(factor * cells[name][field]) + unit if isinstance(cells.get(name), dict) else "-"


def _ranged(ratio: dict | None) -> str:
    return (
        "-"
        if ratio is None
        else f"**{figure(ratio['median'])}** ({figure(ratio['min'])}-{figure(ratio['max'])})"
    )

"""The results of a GPU run: printed as they come, a summary at the end, a JSON and a CSV file."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..timing.rows import Row
from .machine import slug
from .plan import Task

SCHEMA = 1
COLUMNS = (
    "section",
    "name",
    "size",
    "dtype",
    "contestant",
    "status",
    "median_ms",
    "q1_ms",
    "q3_ms",
    "rounds",
    "tflops",
    "gb_per_s",
    "replay_ms",
    "extra_mb",
    "max_error",
    "max_error_eager",
    "note",
)
KEY_RATIOS = (
    "plain/vendor",
    "brush/vendor",
    "brush/plain",
    "brush/composed",
    "brush/eager",
    "cuda_plain/vendor",
    "cuda_brush/vendor",
)


class Results:
    """Collects rows as they come, prints them, and writes complete files after each.

    Args:
        plan: the tasks, in the order of the files.
        conditions: of the run, for the JSON file.
        folder: for the files; made if it is not there.
    """

    def __init__(self, plan: Sequence[Task], conditions: Row, folder: Path) -> None:
        self.plan, self.conditions, self.folder = plan, conditions, folder
        self.machine: Row = {}
        self.rows: dict[int, Row] = {}
        self.start = time.time()

    def set_machine(self, machine: Row) -> None:
        """Keep and print the description of the machine; later ones are ignored."""
        if not self.machine:
            self.machine = machine
            print(title(machine), flush=True)

    def add(self, index: int, row: Row) -> None:
        """Add the row of the task of this index, print it, and write the files."""
        task = self.plan[index]
        self.rows[index] = {**row, "section": task.section, "name": task.title}
        print(f"\n[{time.time() - self.start:.0f} s] {task.section}: {task.title}", flush=True)
        for line in details(self.rows[index], self.gemm):
            print(line, flush=True)
        self.write()

    @property
    def gemm(self) -> float | None:
        """TFLOP/s of the matrix product; None before it is measured."""
        found = [row["gemm_tflops"] for row in self.rows.values() if "gemm_tflops" in row]
        return float(found[0]) if found else None  # type: ignore[arg-type]

    @property
    def ordered(self) -> list[Row]:
        """The rows so far, in the order of the plan."""
        return [self.rows[i] for i in sorted(self.rows)]

    def collect(self, field: str) -> dict[str, str]:
        """A field's entries of all rows, by "section, name: contestant"."""
        found = {}
        for row in self.ordered:
            cells: Any = row.get(field, {})
            found |= {f"{row['section']}, {row['name']}: {name}": str(why) for name, why in cells.items()}
        return found

    @property
    def skipped(self) -> dict[str, str]:
        """The reason of each row that was skipped, by "section, name"."""
        return {f"{r['section']}, {r['name']}": str(r["skipped"]) for r in self.ordered if "skipped" in r}

    @property
    def paths(self) -> dict[str, Path]:
        """The files, by "json" and "csv"; their name has the GPU's."""
        name = f"gpu-{'dry-run' if self.conditions['dry_run'] else slug(str(self.machine.get('gpu')))}"
        return {"json": self.folder / f"{name}.json", "csv": self.folder / f"{name}.csv"}

    def write(self) -> None:
        """Write both files; each replaces the one before when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        results = {
            "schema": SCHEMA,
            "machine": self.machine,
            "conditions": self.conditions,
            "rows": self.ordered,
            "failures": self.collect("failures"),
            "missing": missing_contestants(self.ordered),
            "skipped": self.skipped,
        }
        with _replaced(self.paths["json"]) as file:
            file.write(json.dumps(_finite(results), indent=1, allow_nan=False) + "\n")
        with _replaced(self.paths["csv"]) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(COLUMNS)
            table.writerows(
                [record.get(c, "") for c in COLUMNS] for row in self.ordered for record in records(row)
            )


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[TextIO]:
    """A file to write that replaces `path` when it is complete."""
    beside = path.with_name(f".{path.name}")
    with beside.open("w", newline="") as file:
        yield file
    beside.replace(path)


def _finite(x: Any) -> Any:
    """NaN and Inf as strings, which JSON has no numbers for."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return repr(x) if isinstance(x, float) and not math.isfinite(x) else x


def title(machine: Row) -> str:
    """The machine in one line."""
    where = machine.get("gpu") or f"dry run on the CPU ({machine.get('cpu')})"
    smi: Any = machine.get("nvidia_smi") or {}
    parts = [f"torch {machine['torch']}", f"triton {machine['triton']}", f"CUDA {machine['cuda']}"]
    parts += [f"driver {smi['driver_version']}"] if "driver_version" in smi else []
    parts += [f"SM clock {smi['clocks.sm']} of {smi['clocks.max.sm']}"] if "clocks.sm" in smi else []
    return f"{where}; {', '.join(parts)}"


def missing_contestants(rows: Sequence[Row]) -> dict[str, str]:
    """Contestants that could not run, each with its first reason."""
    found: dict[str, str] = {}
    for row in rows:
        cells: Any = row.get("missing", {})
        for name, why in cells.items():
            found.setdefault(name, why)
    return found


def records(row: Row) -> Iterator[dict[str, object]]:
    """A CSV line for each contestant of a row, timed or not."""
    r: Any = row
    size, dtype = r.get("shape", {}).get("size", ""), r.get("dtype", "")
    base: dict[str, object] = {"section": r["section"], "name": r["name"], "size": size, "dtype": dtype}
    if "skipped" in r:
        yield {**base, "status": "skipped", "note": r["skipped"]}
        return
    for name, error in r.get("errors", {}).items():
        found: dict[str, object] = {**base, "contestant": name, "status": "right"}
        if "max_error" in error:
            found |= {n: f"{error[n]:.3g}" for n in ("max_error", "max_error_eager") if n in error}
        yield {**found, **_times(r, name)}
    for name in r.get("seconds", {}):
        if name not in r.get("errors", {}):
            yield {**base, "contestant": name, "status": "right", **_times(r, name)}
    for status, field in (("wrong", "failures"), ("missing", "missing")):
        for name, why in r.get(field, {}).items():
            yield {**base, "contestant": name, "status": status, "note": why}


def _times(row: Any, name: str) -> dict[str, object]:
    found: dict[str, object] = {}
    if (cell := row.get("seconds", {}).get(name)) is not None:
        found |= {f"{n}_ms": f"{1e3 * cell[n]:.5g}" for n in ("median", "q1", "q3")}
        found["rounds"] = cell["n"]
    for column, field in (("tflops", "tflops"), ("gb_per_s", "gb_per_s")):
        if name in row.get(field, {}):
            found[column] = row[field][name]
    if "median" in row.get("replay_seconds", {}).get(name, {}):
        found["replay_ms"] = f"{1e3 * row['replay_seconds'][name]['median']:.5g}"
    if "extra" in (
        memory := row.get("memory", {}).get(name, {}) if isinstance(row.get("memory"), dict) else {}
    ):
        found["extra_mb"] = f"{memory['extra'] / 1e6:.1f}"
    return found


def details(row: Row, gemm: float | None) -> Iterator[str]:
    """A row in lines for the screen."""
    r: Any = row
    if "skipped" in r:
        yield f"  SKIPPED: {r['skipped']}"
        return
    if "gemm_tflops" in r:
        yield f"  copy {r['copy_tb_per_s']} TB/s (read plus written), bf16 GEMM {r['gemm_tflops']} TFLOP/s"
        return
    if r["section"] == "checks":
        yield f"  {len(r.get('errors', {}))} right, {len(r.get('failures', {}))} wrong"
    for name in sorted(r.get("seconds", {}), key=lambda n: r["seconds"][n]["median"]):
        cell, more = r["seconds"][name], _times(r, name)
        quartiles = f"{1e3 * cell['q1']:.4f} .. {1e3 * cell['q3']:.4f}"
        line = f"  {name:26s} {1e3 * cell['median']:9.4f} ms  ({quartiles}, n {cell['n']})"
        if "tflops" in more:
            line += f"  {more['tflops']:7} TFLOP/s"
            line += f" {100 * float(str(more['tflops'])) / gemm:4.0f} % of GEMM" if gemm else ""
        line += f"  {more['gb_per_s']} GB/s" if "gb_per_s" in more else ""
        line += f"  {more['extra_mb']} MB" if "extra_mb" in more else ""
        line += f"  graph {more['replay_ms']} ms" if "replay_ms" in more else ""
        yield line
    for name, report in r.get("built", {}).items():
        kernels = "; ".join(
            f"{k['registers']} registers, {k['spills']} bytes spilled" for k in report["kernels"].values()
        )
        yield f"  {name}: {'; '.join([kernels, *report['warnings']])}"
    if r.get("ratios"):
        yield "  " + "; ".join(f"{n} {c['median']:.3f}" for n, c in r["ratios"].items())
    for name, why in r.get("failures", {}).items():
        yield f"  WRONG {name}: {why}"


def summary(results: Results) -> Iterator[str]:
    """The end of the output: key ratios by shape, then what was wrong, missing or skipped; about a page."""
    header = f"{'batch, heads, tokens, dim':26s}{'vendor':>14s}{'ms':>9s}{'plain':>9s}{'brush':>9s}"
    yield "\n" + header + "".join(f"{name:>19s}" for name in KEY_RATIOS)
    for row in results.ordered:
        r: Any = row
        if r["section"] not in ("forward", "backward", "compiled") or not r.get("seconds"):
            continue
        seconds = {name: cell["median"] for name, cell in r["seconds"].items()}
        vendors = [n.split("/")[1] for n in r["ratios"] if n.split("/")[0] in ("plain", "brush", "shift")]
        vendors = [n for n in vendors if n in seconds and not n.startswith(("composed", "eager", "plain"))]
        fastest = min(vendors, key=seconds.__getitem__, default=None)
        label = r["shape"]["size"] + (" fwd+bwd" if r["section"] == "backward" else "")
        cells = [f"{fastest or '-':>14s}", *(_ms(seconds.get(n)) for n in (fastest, "plain", "brush"))]
        ratios = [r["ratios"].get(name) for name in KEY_RATIOS]
        yield (
            f"{label:26s}"
            + "".join(cells)
            + "".join(f"{c['median']:19.3f}" if c else f"{'-':>19s}" for c in ratios)
        )
    for row in results.ordered:
        r = row
        if r["section"] in ("layer", "features", "around") and r.get("ratios"):
            kept = {
                n: c["median"]
                for n, c in r["ratios"].items()
                if n.endswith(("/fastest stock", "/plain", "/torch"))
            }
            yield f"{r['section']}, {r['name']}: " + "; ".join(f"{n} {m:.3f}" for n, m in kept.items())
    right = sum(len(r.get("errors", {})) for r in results.ordered)  # type: ignore[arg-type]
    failures = results.collect("failures")
    yield f"{right} results right, {len(failures)} wrong, {len(results.skipped)} tasks skipped"
    for kind, found in (
        ("missing", missing_contestants(results.ordered)),
        ("skipped", results.skipped),
        ("WRONG", failures),
    ):
        yield from (f"{kind}: {name}: {why}" for name, why in found.items())


def _ms(seconds: float | None) -> str:
    return f"{'-' if seconds is None else format(1e3 * seconds, '.4g'):>9s}"

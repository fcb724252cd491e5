"""`flashbrush bench`: check every contestant, time them in the same rounds, print a table, write a JSON file.

`python -m flashbrush.benchmarks.cpu.table --pages` rewrites the figures in README.md and docs/benchmarks.md
from the committed files instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ...integrations.evaluation import machine
from ..cases.float64_check import WrongResult
from ..cases.shapes import EVERY, QUICK, SHAPES
from ..timing.rows import Row, Settings
from . import backward, flux_layer, forward, growth, methods, pages, unet_layer

SCHEMA = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
SECTIONS = ("forward", "backward", "layer", "unet", "methods", "growth")
GROWTH = (1024, 2048, 4096, 8192, 16384)
COMMITTED = machine.ROOT / "benchmarks" / "results" / "cpu.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        argv: the command's arguments; None: the process's.

    Returns:
        Exit code: 0; or 1 where a result is wrong, and then no time is printed or written.

    Raises:
        SystemExit: code 2 for wrong arguments, 0 for --help.
    """
    options = _parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.pages:
        for page in pages.PAGES:
            changed = pages.update(machine.ROOT / page, COMMITTED.parent)
            console.print(f"{page} {'rewritten' if changed else 'is up to date'}")
        return 0
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        results = _measure(options)
    except WrongResult as wrong:
        print(f"flashbrush bench: wrong result, nothing is reported: {wrong}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads_before)
    _show(console, results)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        console.print(f"written: {options.output}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"flashbrush: {message}\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="flashbrush bench", description="Attention on this CPU, ours beside others'.")
    choices = f"of {', '.join(SHAPES)}; with --quick of {', '.join(QUICK)}"
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, 3 repeats, no memory; writes only with --output"
    )
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help=f"{choices} (all)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, help="rounds, each of every contestant once (7)")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out the peak memory, a child process each"
    )
    parser.add_argument("--flex", action="store_true", help="FlexAttention too (compiles: minutes)")
    parser.add_argument("--output", type=Path, help="JSON file (a full run: benchmarks/results/cpu.json)")
    parser.add_argument(
        "--pages",
        action="store_true",
        help="only rewrite the figures in README.md and docs/benchmarks.md from the committed files",
    )
    options = parser.parse_args(argv)
    known = QUICK if options.quick else SHAPES
    partial = options.shapes is not None or len(options.sections) < len(SECTIONS)
    options.shapes = options.shapes or list(known)
    if unknown := [name for name in options.shapes if name not in EVERY]:
        parser.error(f"--shapes: unknown {', '.join(unknown)}; expected {choices}")
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    options.repeats = options.repeats or (3 if options.quick else 7)
    if options.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {options.repeats}")
    if options.output is None and not options.quick and not partial:
        options.output = (
            COMMITTED if (machine.ROOT / "pyproject.toml").exists() else Path("flashbrush-bench.json")
        )
    return options


def _measure(options: argparse.Namespace) -> Row:
    settings = Settings(
        repeats=options.repeats,
        threads=options.threads,
        with_memory=not (options.no_memory or options.quick),
        with_flex=options.flex,
        gemm_sides=(256,) if options.quick else Settings.gemm_sides,
    )
    load_before, rows = machine.load(), []
    tasks = list(_tasks(options, settings))
    with Console(stderr=True).status("") as status:
        for i, (title, task) in enumerate(tasks):
            status.update(f"{i + 1}/{len(tasks)} {title}")
            rows.append(task())
    return {
        "schema": SCHEMA,
        "machine": machine.describe(),
        "conditions": {
            "device": "cpu",
            "threads": settings.threads,
            "repeats": settings.repeats,
            "seed": settings.seed,
            "quick": options.quick,
            "load_before": load_before,
            "load_after": machine.load(),
        },
        "rows": rows,
    }


def _tasks(options: argparse.Namespace, settings: Settings) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(title, call that measures one row) of everything that was asked for."""
    shapes = [EVERY[name] for name in options.shapes]
    dtypes = [DTYPES[name] for name in options.dtypes]
    for shape, dtype in ((s, d) for s in shapes for d in dtypes):
        if "forward" in options.sections:
            yield f"{shape.name}, {dtype}", lambda s=shape, d=dtype: forward.measure(s, d, settings)
        if "backward" in options.sections and max(shape.n_rows, shape.n_keys) <= backward.LONGEST:
            yield (
                f"backward, {shape.name}, {dtype}",
                lambda s=shape, d=dtype: backward.measure(s, d, settings),
            )
        if "layer" in options.sections and {"prompt", "subject", "target"} <= set(shape.rows):
            yield (
                f"FLUX layer, {shape.name}, {dtype}",
                lambda s=shape, d=dtype: flux_layer.measure(s, d, settings),
            )
    for dtype in dtypes if "unet" in options.sections else ():
        side = unet_layer.QUICK_SIDE if options.quick else unet_layer.SIDE
        yield f"UNet layer, {dtype}", lambda n=side, d=dtype: unet_layer.measure(n, d, settings)
    for dtype in dtypes if "methods" in options.sections else ():
        sizes = (
            (methods.QUICK_SIDE, methods.QUICK_TOKENS) if options.quick else (methods.SIDE, methods.TOKENS)
        )
        yield f"methods, {dtype}", lambda s=sizes, d=dtype: methods.measure(*s, d, settings)
    if "growth" in options.sections:
        tokens = (128, 256, 512) if options.quick else GROWTH
        yield f"growth, {dtypes[0]}", lambda: growth.measure(tokens, dtypes[0], settings)


def _show(console: Console, results: Row) -> None:
    about = results["machine"]
    assert isinstance(about, dict) and isinstance(results["rows"], list)
    title = f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}; medians; contr.: controlled"
    table = Table(
        title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    columns = (
        "batch, heads,\ntokens, dim",
        "dtype",
        "SDPA\nms",
        "eager\nms",
        "plain\nms",
        "contr.\nms",
        "SDPA\n/ plain",
        "contr.\n/ plain",
        "eager\n/ contr.",
        "composed\n/ contr.",
        "plain,\nof GEMM",
        "extra MB\ncontr.",
        "extra MB\neager",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    missing: dict[str, str] = {}
    notes: list[str] = []
    for row in results["rows"]:
        missing |= row["missing"]
        dtype = row["dtype"].replace("bfloat", "bf").replace("float", "fp")
        if row["section"] in ("layer", "unet", "methods", "growth"):
            kind = {"layer": "FLUX layer", "unet": "UNet layer, SD-VICL"}.get(row["section"], row["section"])
            what = f"{kind} {row['shape'].get('size', '')}".rstrip()
            pairs = (
                f"{name.replace('/', ' / ')} {pages.figure(r['median'])}" for name, r in row["ratios"].items()
            )
            notes += [f"{what}, {dtype}: {'; '.join(pairs)}"] if row["ratios"] else []
            continue
        times = [_value(row["seconds"], n, "median", 1e3) for n in ("sdpa", "eager", "plain", "controlled")]
        names = ("sdpa/plain", "controlled/plain", "eager/controlled", "composed/controlled")
        ratios = [_value(row["ratios"], n, "median") for n in names]
        extra = [_value(row.get("memory", {}), n, "extra", 1e-6) for n in ("controlled", "eager")]
        label = row["shape"]["size"] + (" fwd+bwd" if "backward" in row["section"] else "")
        table.add_row(label, dtype, *times, *ratios, pages.of_gemm(row), *extra)
    table.caption = "\n".join(notes)
    console.print(table if table.row_count else f"{title}\n{table.caption}")
    for name, reason in missing.items():
        console.print(f"missing: {name}: {reason}", style="yellow")


def _value(cells: Row, name: str, field: str, factor: float = 1.0) -> str:
    cell = cells.get(name)
    return "" if not isinstance(cell, dict) else pages.figure(factor * cell[field])


if __name__ == "__main__":
    sys.exit(main())

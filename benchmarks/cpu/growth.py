"""How our cost grows with the tokens, and shrinks with removed segment pairs and with fewer rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from ...bindings import Control, Segments, attention, backends
from ..cases.contestants import PLAIN
from ..cases.float64_check import ExpectedRows
from ..cases.inputs import Case, draw_case
from ..cases.shapes import diptych
from ..timing.host_clock import time_on_host
from ..timing.rounds import Spread, ratio
from ..timing.rows import Row, Settings, dtype_name, ratio_cells, seconds_cells, untimed

HEADS, DIM = 4, 128


@torch.no_grad()
def measure(tokens: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> Row:
    """Plain attention of (1, 4, n, 128) for each n of `tokens`.

    Ratios: time per (row x key) over that of the first length. At the middle length also: half of the rows do
    not attend to half of the keys, which removes a quarter of the work; and a quarter of the rows alone.

    Raises:
        WrongResult: a result is wrong.
    """
    row: Row = {"section": "growth", "shape": {"heads": HEADS, "dim": DIM, "tokens": list(tokens)}}
    row["dtype"] = dtype_name(dtype)
    if reasons := backends()["cpu"]:
        return untimed(row, "plain", reasons)
    calls: dict[str, Callable[[], object]] = {}
    for n in tokens:
        case = draw_case(diptych(f"growth-{n}", HEADS, n // 8, (n - n // 8) // 2, DIM), dtype, settings.seed)
        calls[f"plain_{n}"], out = PLAIN.start(case)
        ExpectedRows(case, controlled=False).check(f"{PLAIN.title} at {n} tokens, {dtype}", out)
        if n == tokens[len(tokens) // 2]:
            calls |= _parts_of(case)
    samples = time_on_host(calls, settings.repeats, seed=settings.seed)
    first, middle = f"plain_{tokens[0]}", f"plain_{tokens[len(tokens) // 2]}"
    area = {n: (n // 8 + 2 * ((n - n // 8) // 2)) ** 2 for n in tokens}
    ratios: dict[str, Spread] = {
        f"time per row x key, {n} tokens/{tokens[0]} tokens": ratio(
            samples, f"plain_{n}", first, factor=area[tokens[0]] / area[n]
        )
        for n in tokens[1:]
    }
    ratios["a quarter of the pairs removed/all"] = ratio(samples, "removed_pair", middle)
    ratios["a quarter of the rows/all"] = ratio(samples, "quarter_rows", middle)
    return {**row, "seconds": seconds_cells(samples), "ratios": ratio_cells(ratios), "missing": {}}


def _parts_of(case: Case) -> dict[str, Callable[[], object]]:
    n = case.shape.n_rows
    halves = Segments(first=n // 2, second=n - n // 2)
    cut = Control(halves, bias={("second", "first"): -math.inf})
    quarter = case.q[:, : n // 4].contiguous()
    return {
        "removed_pair": functools.partial(attention, case.q, case.k, case.v, cut, backend="cpu"),
        "quarter_rows": functools.partial(attention, quarter, case.k, case.v, backend="cpu"),
    }

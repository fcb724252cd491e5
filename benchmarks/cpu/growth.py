"""How our cost grows: with the tokens, with removed segment pairs, with the rows asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from ...bindings import Control, Segments, attention, backends
from ..cases.shapes import diptych
from ..cases.truth import Truth
from ..timing.paired import Spread, paired, ratio
from . import peers
from .forward import Row, Settings, rounded, seconds

HEADS, DIM = 4, 128


@torch.no_grad()
def measure(tokens: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> Row:
    """Of plain attention at (1, 4, tokens, 128): time per (row x key) against the first length; then, at the
    middle length, half the rows not seeing half the keys (1/4 of the work goes), and a quarter of the rows.

    Raises:
        truth.WrongResult: a result is wrong.
    """
    row: Row = {"section": "growth", "shape": {"heads": HEADS, "dim": DIM, "tokens": list(tokens)}}
    row["dtype"] = str(dtype).removeprefix("torch.")
    if reasons := backends()["cpu"]:
        return {**row, "seconds": {}, "ratios": {}, "missing": {"plain": "; ".join(reasons)}}
    calls: dict[str, Callable[[], object]] = {}
    for n in tokens:
        case = peers.draw(diptych(f"growth-{n}", HEADS, n // 8, (n - n // 8) // 2, DIM), dtype, settings.seed)
        calls[f"plain_{n}"], out = peers.PLAIN.start(case)
        Truth(case, controlled=False).check(f"{peers.PLAIN.title} at {n} tokens, {dtype}", out)
        if n == tokens[len(tokens) // 2]:
            calls |= _shares(case)
    samples = paired(calls, settings.repeats, seed=settings.seed)
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
    return {**row, "seconds": seconds(samples), "ratios": rounded(ratios), "missing": {}}


def _shares(case: peers.Case) -> dict[str, Callable[[], object]]:
    n = case.shape.n_rows
    halves = Segments(first=n // 2, second=n - n // 2)
    cut = Control(halves, bias={("second", "first"): -math.inf})
    quarter = case.q[:, : n // 4].contiguous()
    return {
        "removed_pair": functools.partial(attention, case.q, case.k, case.v, cut, backend="cpu"),
        "quarter_rows": functools.partial(attention, quarter, case.k, case.v, backend="cpu"),
    }

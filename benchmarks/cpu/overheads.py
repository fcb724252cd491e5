"""What each shortcut in the Python of a short call saves: the call with it, and without it, in paired rounds.

    python -m flashbrush.benchmarks.cpu.overheads --output benchmarks/results/overheads.json

A shortcut stays in the library only while this shows that it saves time. One thread, 16 tokens, 8 heads of
64: the kernel takes a few microseconds, so the time is Python's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ... import bindings
from ...bindings import Control, HeadGain, Segments
from ...bindings.backends.cpu import attention as cpu_attention, structures
from ...bindings.core import coalesce
from ...bindings.core.problem import Problem
from ...integrations.evaluation import machine
from ..timing.host_clock import time_on_host
from ..timing.rounds import ratio, spread

ROUNDS = 31


def calls() -> dict[str, Callable[[], object]]:
    """Plain and controlled attention; a controlled one with a head gain, which needs the mass."""
    q, k, v = torch.randn(3, 1, 16, 8, 64)
    segments = Segments(prompt=4, subject=6, target=6)
    weight = {("target", "prompt"): 1.3, ("target", "subject"): 1.3}
    control = Control(segments, weight=weight)
    brush = Control(segments, weight=weight, head_gain=HeadGain())
    return {
        "plain": lambda: bindings.attention(q, k, v),
        "controlled": lambda: bindings.attention(q, k, v, control),
        "brush": lambda: bindings.attention(q, k, v, brush),
    }


def _replaced(target: object, name: str, value: object) -> contextlib.AbstractContextManager:
    return mock.patch.object(target, name, value)


@contextlib.contextmanager
def _dispatched() -> Iterator[None]:
    with mock.patch(f"{bindings.__name__}.attention.can_skip_dispatcher", lambda *_: False):
        yield


def _replace(problem: Problem, **values: object) -> Problem:
    return dataclasses.replace(problem, **values)


# {shortcut: a context in which the library works without it}
SHORTCUTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "dispatcher bypass": _dispatched,
    "cached C structure": lambda: _replaced(structures, "_structure", structures._structure.__wrapped__),
    "cached segment flags": lambda: _replaced(cpu_attention, "_flags", cpu_attention._flags.__wrapped__),
    "cached joins of segments": lambda: _replaced(coalesce, "_join", coalesce._join.__wrapped__),
    "cached index tensors": lambda: _replaced(coalesce, "_index", coalesce._index.__wrapped__),
    "Problem.changed": lambda: _replaced(Problem, "changed", _replace),
}


def measure(rounds: int = ROUNDS) -> dict[str, dict[str, dict]]:
    """{shortcut: {call: microseconds with it and without it, and their ratio}}"""
    found: dict[str, dict[str, dict]] = {}
    for shortcut, without in SHORTCUTS.items():
        found[shortcut] = {}
        for name, call in calls().items():

            def slower(call: Callable[[], object] = call, without=without) -> None:
                with without():
                    for _ in range(100):
                        call()

            def quicker(call: Callable[[], object] = call) -> None:
                for _ in range(100):
                    call()

            samples = time_on_host({"with": quicker, "without": slower}, rounds)
            found[shortcut][name] = {
                "microseconds": {
                    which: spread([1e4 * s for s in times]).as_dict() for which, times in samples.items()
                },
                "without / with": ratio(samples, "without", "with").as_dict(),
            }
    found["Problem, not frozen"] = {"construction": _construction(rounds)}
    return found


def _construction(rounds: int) -> dict:
    """Constructing a Problem as it is, and as a frozen dataclass."""
    fields = [(f.name, f.type, dataclasses.field(default=None)) for f in dataclasses.fields(Problem)]
    frozen = dataclasses.make_dataclass("Frozen", fields, frozen=True, kw_only=True, eq=False)
    values: dict[str, Any] = {f.name: None for f in dataclasses.fields(Problem)}
    samples = time_on_host(
        {
            "with": lambda: [Problem(**values) for _ in range(100)],
            "without": lambda: [frozen(**values) for _ in range(100)],
        },
        rounds,
    )
    return {
        "microseconds": {which: spread([1e4 * s for s in t]).as_dict() for which, t in samples.items()},
        "without / with": ratio(samples, "without", "with").as_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.rounds)
    for shortcut, rows in found.items():
        for name, row in rows.items():
            times, share = row["microseconds"], row["without / with"]
            time = times["with"]["median"]
            saved = times["without"]["median"] - time
            print(
                f"{shortcut:26} {name:12} {time:7.1f} us, saves {saved:6.1f} us, "
                f"ratio {share['median']:.3f} ({share['q1']:.3f} to {share['q3']:.3f})"
            )
    if options.output is not None:
        results = {
            "conditions": {
                "threads": 1,
                "rounds": options.rounds,
                "calls a sample": 100,
                "load": machine.load(),
            },
            "machine": machine.describe(),
            "shortcuts": found,
        }
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

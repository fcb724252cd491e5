"""What each shortcut in the Python of a short call saves: the call with it, and without it, in paired rounds.

    python -m flashbrush.benchmarks.cpu.overheads --output benchmarks/results/overheads.json

A shortcut stays in the library only while this shows that it saves time. One thread, 16 tokens, 8 heads of
64: the kernel takes a few microseconds, so the time is Python's. For the caches of Triton's launches, the
time ends where Triton gets the arguments; no GPU is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ... import bindings
from ...bindings import Control, HeadGain, Segments
from ...bindings.backends.cpu import structures
from ...bindings.backends.gpu import constants, statistics
from ...bindings.core import coalesce
from ...bindings.core.lowering import lower
from ...bindings.core.problem import Problem
from ...integrations.diffusers import Layer, Plan, Step, compose
from ...integrations.diffusers.protocol.compose import Composition
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


def triton_calls() -> dict[str, Callable[[], object]]:
    """As calls(), from the problem to the launch; also with 77 keys of a segment each, which share tiles."""
    from ...bindings.backends.triton import attention

    q, k, v = torch.randn(3, 1, 16, 8, 64)
    segments = Segments(prompt=4, subject=6, target=6)
    weight = {("target", "prompt"): 1.3, ("target", "subject"): 1.3}
    words = Segments({f"w{i}": 1 for i in range(77)})
    long_k, long_v = torch.randn(2, 1, 77, 8, 64)
    problems = {
        "plain": lower(q, k, v, None),
        "controlled": lower(q, k, v, Control(segments, weight=weight)),
        "brush": lower(q, k, v, Control(segments, weight=weight, head_gain=HeadGain())),
        "words": lower(q, long_k, long_v, Control(segments, words, weight={("target", "w3"): 1.3})),
    }
    return {name: functools.partial(attention.forward, problem) for name, problem in problems.items()}


@contextlib.contextmanager
def _uncached(name: str, *modules: object) -> Iterator[None]:
    """A cached function of some modules without its cache."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, name, getattr(module, name).__wrapped__))
        yield


@contextlib.contextmanager
def _dispatched() -> Iterator[None]:
    with mock.patch(f"{bindings.__name__}.attention.can_skip_dispatcher", lambda *_: False):
        yield


class _Forgetful(dict):
    """A cache that keeps nothing."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


def _composition() -> tuple[Composition, Layer]:
    """Two methods with a control each, which a composition joins in every layer and step, and a layer."""

    class Weighted:
        def __init__(self, name: str) -> None:
            self.made = Plan(Control(Segments({name: 6, "rest": 10}), weight={("rest", name): 1.3}))

        def plan(self, layer: Layer, step: Step) -> Plan:
            return self.made

    layer = Layer(index=0, kind="single", place=None, heads=8, head_dim=64, text_len=4, image_len=12)
    return compose(Weighted("prompt"), Weighted("subject")), layer


def _replace(problem: Problem, **values: object) -> Problem:
    return dataclasses.replace(problem, **values)


# {shortcut: a context in which the library works without it}
SHORTCUTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "dispatcher bypass": _dispatched,
    "cached C structure": lambda: _uncached("_structure", structures),
    "cached joins of segments": lambda: _uncached("_join", coalesce),
    "cached index tensors": lambda: _uncached("_index", coalesce),
    "Problem.changed": lambda: mock.patch.object(Problem, "changed", _replace),
}


def triton_shortcuts() -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """SHORTCUTS of the Triton launches. Without a GPU a constant is made but not copied to a device."""
    from ...bindings.backends.triton import attention, launch
    from ...kernels.attention import traits

    users = (constants, statistics, attention, launch)
    return {
        "Triton: cached constant tensors": lambda: _uncached("constant", *users),
        "Triton: cached segment starts": lambda: _uncached("_starts", constants),
        "Triton: cached joined ranges": lambda: _uncached("joined_ranges", launch),
        "Triton: cached traits": lambda: _uncached("_constants", traits),
    }


def measure(rounds: int = ROUNDS) -> dict[str, dict[str, dict]]:
    """{shortcut: {call: microseconds with it and without it, and their ratio}}"""
    found = _compare(SHORTCUTS, calls(), rounds)
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime.jit import JITFunction

        with mock.patch.object(JITFunction, "run", lambda *args, **options: None):
            found |= _compare(triton_shortcuts(), triton_calls(), rounds)
    method, layer = _composition()
    found |= _compare(
        {"kept joined plans": lambda: mock.patch.object(method, "_kept", _Forgetful())},
        {"compose": lambda: method.plan(layer, Step(0, 1, 1.0))},
        rounds,
    )
    found["Problem, not frozen"] = {"construction": _construction(rounds)}
    return found


def _compare(
    shortcuts: dict[str, Callable[[], contextlib.AbstractContextManager]],
    contestants: dict[str, Callable[[], object]],
    rounds: int,
) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for shortcut, without in shortcuts.items():
        found[shortcut] = {}
        for name, call in contestants.items():

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
    return found


def _construction(rounds: int) -> dict:
    """The time to construct a Problem, which is not frozen, and a frozen copy of its class."""
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
                f"{shortcut:36} {name:12} {time:7.1f} us, saves {saved:6.1f} us, "
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

"""Rounds of timing: contestants take turns in random order, inputs rotate, ratios are paired."""

from __future__ import annotations

import torch

from flashbrush.benchmarks.timing import device_clock
from flashbrush.benchmarks.timing.device_clock import time_on_device
from flashbrush.benchmarks.timing.host_clock import time_on_host
from flashbrush.benchmarks.timing.rounds import ratio, spread


def test_on_the_host() -> None:
    order: list[str] = []
    samples = time_on_host({n: lambda n=n: order.append(n) for n in "abc"}, rounds=5, shortest=0.0)
    assert all(len(s) == 5 for s in samples.values())
    rounds = [tuple(order[3 + 3 * i : 6 + 3 * i]) for i in range(5)]  # after a call each to warm up
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1


def test_on_a_device() -> None:
    order: list[tuple[str, int]] = []
    calls = {n: [lambda n=n, i=i: order.append((n, i)) for i in range(3)] for n in "abc"}
    samples = time_on_device(calls, torch.device("cpu"), 0.0)
    assert all(len(s) == device_clock.ROUNDS[0] for s in samples.values())
    rounds = order[9 + 3 :]  # after a call with each set of inputs, and one each that estimates the time
    rounds = [rounds[i : i + 3] for i in range(0, len(rounds), 3)]
    assert all(sorted(n for n, _ in r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(n for n, _ in r) for r in rounds}) > 1
    assert [r[0][1] for r in rounds] == [i % 3 for i in range(len(rounds))]


def test_ratios_are_paired() -> None:
    found = ratio({"a": [2.0, 4.0, 90.0], "b": [1.0, 2.0, 30.0]}, "a", "b")
    assert (found.median, found.min, found.max, found.n) == (2.0, 2.0, 3.0, 3)
    assert spread([5.0]).q1 == 5.0

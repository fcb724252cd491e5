"""Paired timing: all contestants in every round, in random order, so that noise disturbs all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and range of a sample."""

    median: float
    q1: float
    q3: float
    min: float
    max: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def spread(sample: Sequence[float]) -> Spread:
    q1, _, q3 = statistics.quantiles(sample, n=4, method="inclusive") if len(sample) > 1 else (sample[0],) * 3
    return Spread(statistics.median(sample), q1, q3, min(sample), max(sample), len(sample))


def ratio(samples: Mapping[str, Sequence[float]], above: str, below: str, factor: float = 1.0) -> Spread:
    """Of factor * above / below, round by round."""
    return spread([factor * a / b for a, b in zip(samples[above], samples[below], strict=True)])


def paired(
    calls: Mapping[str, Callable[[], object]], repeats: int = 7, shortest: float = 0.02, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one sample a round.

    Each is called before, which also tells how many calls make a sample of at least `shortest` seconds.
    """
    counts = {}
    for name, call in calls.items():
        first = _time(call, 1)
        again = first if first >= shortest else _time(call, 1)
        counts[name] = max(1, min(200, round(shortest / max(again, 1e-7))))
    order = list(calls)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            samples[name].append(_time(calls[name], counts[name]))
    return samples


def _time(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count

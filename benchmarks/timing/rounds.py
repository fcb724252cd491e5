"""Rounds of timing: every contestant once a round, in random order, so that noise disturbs all alike.

Samples of one round are neighbours in time, so a ratio is taken round by round, then summarised.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

Calls = Sequence[Callable[[], object]]  # one contestant's call on each set of inputs
Samples = dict[str, list[float]]  # seconds per call of each contestant, in the order of the rounds


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and range of a sample of `n` values."""

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
    """Spread of factor * above / below, taken round by round."""
    return spread([factor * a / b for a, b in zip(samples[above], samples[below], strict=True)])


def run_rounds(
    contestants: Mapping[str, Calls],
    rounds: int,
    sample: Callable[[str, Callable[[], object]], None],
    seed: int = 0,
) -> None:
    """Sample each contestant once a round; the order is random within a round, the inputs rotate.

    Args:
        contestants: calls of each contestant, one per set of inputs.
        rounds: number of rounds.
        sample: takes a contestant's name and the call to time.
        seed: of the order.
    """
    order, shuffle = list(contestants), random.Random(seed).shuffle
    for i in range(rounds):
        shuffle(order)
        for name in order:
            sample(name, contestants[name][i % len(contestants[name])])

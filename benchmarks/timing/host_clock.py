"""Times on the CPU, by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from .rounds import Samples, run_rounds


def time_on_host(
    calls: Mapping[str, Callable[[], object]], rounds: int = 7, shortest: float = 0.02, seed: int = 0
) -> Samples:
    """Seconds per call of every contestant, one sample a round.

    Args:
        calls: what to time, by contestant. Each is called once or twice beforehand, to warm up and to find
            out how many calls make a sample.
        rounds: number of samples of each contestant.
        shortest: seconds that a sample lasts at least; a sample of a shorter call is made of up to 200 calls.
        seed: of the order within the rounds.
    """
    counts: dict[str, int] = {}
    for name, call in calls.items():
        first = _seconds_per_call(call, 1)
        again = first if first >= shortest else _seconds_per_call(call, 1)
        counts[name] = max(1, min(200, round(shortest / max(again, 1e-7))))
    samples: Samples = {name: [] for name in calls}

    def sample(name: str, call: Callable[[], object]) -> None:
        samples[name].append(_seconds_per_call(call, counts[name]))

    run_rounds({name: [call] for name, call in calls.items()}, rounds, sample, seed)
    return samples


def _seconds_per_call(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count

"""Times on a GPU, by device events: the L2 cache is flushed before every call, and inputs rotate.

Without a GPU, for a dry run, the same rounds are timed by the host's clock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .rounds import Calls, Samples, run_rounds, spread

ROUNDS = (7, 60)  # fewest and most
SHORT = 2e-3  # seconds; for shorter calls the host's time would be measured too
SPIN = 1_000_000  # clock cycles, about half a millisecond: longer than the host needs for a call


def time_on_device(
    contestants: Mapping[str, Calls], device: torch.device, seconds: float, seed: int = 0
) -> Samples:
    """Seconds per call of every contestant, one sample a round.

    Args:
        contestants: calls of each contestant, one per set of inputs (see `input_sets`).
        device: where the calls run.
        seconds: about how long all rounds together may take; at least 7 and at most 60 rounds are made.
        seed: of the order within the rounds.
    """
    clock = DeviceClock(device)
    for calls in contestants.values():
        for call in calls:
            call()
    once = sum(clock.once(calls[0]) for calls in contestants.values())
    clock.spins = once < SHORT * len(contestants)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(once, 1e-6))))
    run_rounds(contestants, rounds, clock.sample, seed)
    return clock.seconds()


class DeviceClock:
    """Device events around a call that follows a flush of the L2 cache.

    The host runs ahead, so its launches hide behind the flush.

    Attributes:
        spins: whether the device also spins before the call, for calls that are shorter than their launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.spins = False
        self._samples: dict[str, list] = {}
        if self.cuda:
            self.flush = torch.empty(max(2 * l2_bytes(device), 256 << 20), dtype=torch.int8, device=device)

    def sample(self, name: str, call: Callable[[], object]) -> None:
        """Make a call and keep its time under a name."""
        self._samples.setdefault(name, []).append(self._start(call))

    def seconds(self) -> Samples:
        """All samples so far, in the order of their calls."""
        if not self.cuda:
            return self._samples
        torch.cuda.synchronize(self.device)
        return {name: [a.elapsed_time(b) * 1e-3 for a, b in pairs] for name, pairs in self._samples.items()}

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call, which is not kept."""
        sample: Any = self._start(call)
        if not self.cuda:
            return sample
        torch.cuda.synchronize(self.device)
        return sample[0].elapsed_time(sample[1]) * 1e-3

    def _start(self, call: Callable[[], object]) -> Any:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        if self.spins:
            torch.cuda._sleep(SPIN)
        start.record()
        call()
        end.record()
        return start, end


def time_replays(contestants: Mapping[str, Calls], device: torch.device) -> dict[str, dict]:
    """Spread of a call's seconds within a CUDA graph, or why it cannot be captured; empty without CUDA."""
    found: dict[str, dict] = {}
    for name, calls in contestants.items() if device.type == "cuda" else ():
        try:
            # A capture that fails leaves its own stream as the current one.
            with torch.cuda.stream(torch.cuda.current_stream(device)):
                found[name] = spread(_replayed(calls, device)).as_dict()
        except Exception as error:
            found[name] = {"missing": str(error).splitlines()[0] if str(error) else type(error).__name__}
    return found


def _replayed(calls: Calls, device: torch.device, length: int = 16, rounds: int = 15) -> list[float]:
    """Seconds per call within replays of a CUDA graph of `length` calls, whose inputs rotate."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), length):
            call()
    graph.replay()
    clock = DeviceClock(device)
    for _ in range(rounds):
        clock.sample("replay", graph.replay)
    return [t / length for t in clock.seconds()["replay"]]


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; 64 MiB where torch does not say."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


def input_sets(device: torch.device, size: int) -> int:
    """How many sets of inputs, of `size` bytes each, exceed the L2 cache twice over; 2 to 8."""
    if device.type != "cuda":
        return 2
    return max(2, min(8, -(-2 * l2_bytes(device) // size)))

"""Times on a GPU: contestants take turns on inputs that rotate, the L2 cache is flushed before every call.

On the CPU, for a dry run, the same rounds with the host's clock.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..timing import paired as timing

Calls = Sequence[Callable[[], object]]  # one contestant's call for each set of inputs
ROUNDS = (7, 60)
SHORT = 2e-3  # seconds; of calls that take less on average, the host's part would show
SPIN = 1_000_000  # clock cycles, about half a millisecond: more than the host needs for a call


def interleaved(
    contestants: Mapping[str, Calls], device: torch.device, seconds: float, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one sample a round, in random order within a round.

    Args:
        seconds: about how long all the rounds together may take; 7 rounds are made whatever they take, at
            most 60.
    """
    clock = Clock(device)
    for calls in contestants.values():
        for call in calls:
            call()
    once = sum(clock.once(calls[0]) for calls in contestants.values())
    clock.spins = once < SHORT * len(contestants)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(once, 1e-6))))
    order, shuffle = list(contestants), random.Random(seed).shuffle
    for i in range(rounds):
        shuffle(order)
        for name in order:
            clock.sample(name, contestants[name][i % len(contestants[name])])
    return clock.seconds()


class Clock:
    """Device events around a call that follows a flush; the host runs ahead, so that launches hide behind the
    flush.

    spins: behind a spin too, which takes longer than the host's part of a call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.spins = False
        self._samples: dict[str, list] = {}
        if self.cuda:
            self.flush = torch.empty(max(2 * l2_bytes(device), 256 << 20), dtype=torch.int8, device=device)

    def sample(self, name: str, call: Callable[[], object]) -> None:
        self._samples.setdefault(name, []).append(self._start(call))

    def seconds(self) -> dict[str, list[float]]:
        """All samples so far, in the order of their calls."""
        if not self.cuda:
            return self._samples
        torch.cuda.synchronize(self.device)
        return {name: [a.elapsed_time(b) * 1e-3 for a, b in pairs] for name, pairs in self._samples.items()}

    def once(self, call: Callable[[], object]) -> float:
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


def replays(contestants: Mapping[str, Calls], device: torch.device) -> dict[str, dict]:
    """Median and quartiles of a call within a CUDA graph, or why it cannot be captured; empty without CUDA."""
    found: dict[str, dict] = {}
    for name, calls in contestants.items() if device.type == "cuda" else ():
        try:
            # A capture that fails leaves its own stream as the current one.
            with torch.cuda.stream(torch.cuda.current_stream(device)):
                found[name] = timing.spread(_replayed(calls, device)).as_dict()
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
    clock = Clock(device)
    for _ in range(rounds):
        clock.sample("replay", graph.replay)
    return [t / length for t in clock.seconds()["replay"]]


def l2_bytes(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


def sets(device: torch.device, inputs: int) -> int:
    """How many sets of inputs, of `inputs` bytes each, are more than the L2 cache holds; 2 to 8."""
    if device.type != "cuda":
        return 2
    return max(2, min(8, -(-2 * l2_bytes(device) // inputs)))

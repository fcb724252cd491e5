"""The forward pass, plain and controlled: the vendor's attention, the papers' eager form, this CPU's GEMM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..cases.shapes import Shape
from ..cases.truth import Truth
from ..timing import memory
from ..timing.paired import Spread, paired, ratio, spread
from . import peers

Row = dict[str, object]
RATIOS = (
    ("sdpa", "plain"),
    ("sdpa", "controlled"),
    ("controlled", "plain"),
    ("eager", "controlled"),
    ("composed", "controlled"),
    ("flex", "plain"),
)


@dataclass(frozen=True)
class Settings:
    repeats: int = 7
    threads: int = 1
    seed: int = 0
    with_memory: bool = True
    with_flex: bool = False
    gemm_sides: tuple[int, ...] = peers.GEMM_SIDES


@torch.no_grad()
def measure(shape: Shape, dtype: torch.dtype, settings: Settings) -> Row:
    """Every contestant at one shape: its result checked, then timed in the same rounds, then its peak memory.

    Raises:
        truth.WrongResult: a contestant's result is wrong.
    """
    case = peers.draw(shape, dtype, settings.seed)
    truths: dict[bool, Truth] = {}
    calls: dict[str, Callable[[], object]] = {}
    errors, missing = {}, {}
    contestants = {**peers.PEERS, **(peers.OPTIONAL if settings.with_flex else {})}
    for name, peer in contestants.items():
        try:
            call, out = peer.start(case)
        except peers.Missing as reason:
            missing[name] = str(reason)
            continue
        if peer.controlled not in truths:
            truths[peer.controlled] = Truth(case, peer.controlled)
        errors[name] = truths[peer.controlled].check(
            f"{peer.title} at {shape.name}, {dtype}", out, peer.slack
        )
        calls[name] = call
        del out
    gemm_flops: dict[str, int] = {}
    for side in settings.gemm_sides:
        calls[f"gemm_{side}"], gemm_flops[f"gemm_{side}"] = peers.gemm(side, dtype)

    samples = paired(calls, settings.repeats, seed=settings.seed)
    ratios = {f"{a}/{b}": ratio(samples, a, b) for a, b in RATIOS if a in samples and b in samples}
    for name in (n for n in ("plain", "controlled", "sdpa") if n in samples):
        for side, flops in gemm_flops.items():
            ratios[f"{name} rate/{side} rate"] = ratio(samples, side, name, factor=shape.flops / flops)
    work = {name: gemm_flops.get(name, shape.flops) for name in samples}
    return {
        "section": "forward",
        "shape": describe(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds(samples),
        "gflops": {name: round(work[name] / spread(s).median / 1e9, 1) for name, s in samples.items()},
        "ratios": rounded(ratios),
        "errors": errors,
        "memory": _memory(shape, case, errors, settings),
        "missing": missing,
    }


def describe(shape: Shape) -> Row:
    return {
        "name": shape.name,
        "size": shape.size,
        "batch": shape.batch,
        "heads": shape.heads,
        "rows": shape.n_rows,
        "keys": shape.n_keys,
        "dim": shape.dim,
        "row_segments": len(shape.rows),
        "key_segments": len(shape.keys),
    }


def seconds(samples: dict[str, list[float]]) -> dict[str, Row]:
    return {name: {**spread(s).as_dict(), "samples": s} for name, s in samples.items()}


def rounded(ratios: dict[str, Spread]) -> dict[str, Row]:
    return {name: {k: round(v, 4) for k, v in s.as_dict().items()} for name, s in ratios.items()}


def _memory(shape: Shape, case: peers.Case, ran: dict, settings: Settings) -> Row:
    """Bytes; empty where it was not asked for or the system does not tell."""
    if not settings.with_memory or not memory.measurable():
        return {}
    inputs = sum(t.numel() * t.element_size() for t in (case.q, case.k, case.v))
    output = case.q.numel() * case.q.element_size()
    result: Row = {"q_k_v_out": inputs + output, "output": output}
    for name in ran:
        if (found := memory.peak(name, shape.name, case.dtype, settings.threads)) is not None:
            result[name] = {"peak": found.peak, "extra": found.extra}
    return result

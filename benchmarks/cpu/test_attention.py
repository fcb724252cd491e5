"""Every contestant at small shapes, one by one: `pytest benchmarks --benchmark-only`.

These are for watching one contestant between two commits. Contestants are compared in the same rounds, in
pairs, by `flashbrush bench`.
"""

from __future__ import annotations

import pytest
import torch

from flashbrush.benchmarks.cases.shapes import SHAPES, diptych, text_cross_attention
from flashbrush.benchmarks.cases.truth import Truth
from flashbrush.benchmarks.cpu import backward, peers

SMALL = (
    SHAPES["h8-1024-d64"],
    diptych("h4-1024-d128", 4, 128, 448, 128),
    text_cross_attention("cross", 2, 8, 1024, 77, 40),
)
DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("peer", peers.PEERS.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SMALL, ids=lambda s: s.name)
@torch.no_grad()
def test_forward(benchmark, shape, dtype, peer) -> None:
    case = peers.draw(shape, dtype)
    try:
        call, out = peer.start(case)
    except peers.Missing as reason:
        pytest.skip(str(reason))
    Truth(case, peer.controlled).check(peer.title, out, peer.slack)
    benchmark.group = f"{shape.size} {dtype}"
    benchmark(call)


@pytest.mark.parametrize("name", backward.CONTESTANTS)
def test_forward_and_backward(benchmark, name) -> None:
    case = peers.draw(SMALL[0], torch.bfloat16)
    if name == "plain" and (reasons := peers.backends()["cpu"]):
        pytest.skip("; ".join(reasons))
    backward.check(peers.draw(SMALL[0].shrunk(), torch.bfloat16), list(backward.CONTESTANTS))
    benchmark.group = f"forward and backward, {SMALL[0].size} {case.dtype}"
    benchmark(backward.step(name, case))

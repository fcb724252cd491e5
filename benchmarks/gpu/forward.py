"""The forward pass on a GPU: each contestant checked, then timed in turns with all others, then its peak
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..cases.shapes import Shape
from ..cases.truth import Truth
from ..cpu.forward import Row, describe, rounded, seconds
from ..cpu.peers import Case, Peer, draw
from ..timing import paired as timing
from . import peers as gpu_peers
from .machine import Setup, judged
from .shapes import CUDA, OWN, dry, vary
from .timing import interleaved, replays, sets

Entry = tuple[
    str, Peer, str
]  # what it is called in the results, the contestant, the variant that it is given
SECONDS = 2.0  # that the rounds of one row may take


def main_entries(setup: Setup) -> list[Entry]:
    """Every plain attention there is, ours plain and with In-Context Brush, and the latter's other forms."""
    entries: list[Entry] = [(name, peer, "plain") for name, peer in gpu_peers.VENDORS.items()]
    own = ("plain", "shift", "brush", "cuda_plain", "cuda_shift", "cuda_brush")
    entries += [(name, gpu_peers.mine(setup, name), OWN[name]) for name in own]
    entries += [("composed", gpu_peers.COMPOSED, "brush"), ("eager", gpu_peers.EAGER, "brush")]
    return entries + [
        (name, peer, "brush" if peer.controlled else "plain") for name, peer in setup.more.items()
    ]


def feature_entries(setup: Setup) -> list[Entry]:
    """Every other variant of ours, beside our plain call and the other forms of the same."""
    names = ("plain", "groups", "contrast", "contrast_linear", "quarter")
    names += ("cuda_plain", "cuda_groups", "cuda_contrast_linear", "cuda_quarter")
    entries: list[Entry] = [(name, gpu_peers.mine(setup, name), OWN[name]) for name in names]
    entries += [("cudnn", gpu_peers.VENDORS["cudnn"], "plain")]
    entries += [
        (f"composed_{name}", gpu_peers.COMPOSED, name) for name in ("groups", "contrast_linear", "quarter")
    ]
    return entries + [(f"eager_{name}", gpu_peers.EAGER, name) for name in ("groups", "contrast")]


def compiled_entries(setup: Setup) -> list[Entry]:
    """What has to be compiled first, which takes torch its time."""
    entries: list[Entry] = [(name, gpu_peers.mine(setup, name), name) for name in ("plain", "brush")]
    entries += [("cudnn", gpu_peers.VENDORS["cudnn"], "plain"), ("flex", gpu_peers.FLEX, "plain")]
    return entries + [(name, peer, "brush") for name, peer in gpu_peers.composed_forms().items()]


@torch.no_grad()
def measure(setup: Setup, shape: Shape, entries: Iterable[Entry], graphs: bool = False) -> Row:
    """One row: who is wrong is named in `failures` with its error, and has no time; who cannot run is in
    `missing`.
    """
    shape, dtype, device = dry(shape) if setup.dry else shape, torch.bfloat16, setup.device
    inputs = 2 * shape.batch * shape.heads * shape.dim * (shape.n_rows + 2 * shape.n_keys)
    cases = [draw(shape, dtype, seed, device) for seed in range(sets(device, inputs))]
    row: Row = {"section": "forward", "shape": describe(shape), "dtype": "bfloat16"}
    truths: dict[tuple[str, bool], Truth] = {}
    varied: dict[str, list[Case]] = {}
    calls: dict[str, list[Callable[[], Tensor]]] = {}
    errors, missing, failures, memory, work = {}, {}, {}, {}, {}
    for label, peer, name in entries:
        if name not in varied:
            varied[name] = [vary(case, name) for case in cases]
        case = varied[name][0]
        with judged(label, missing, failures, device, ours=label in OWN):
            prepared = [peer.prepare(c) for c in varied[name]]
            out, heads_first = first(prepared[0], case)
            if (name, peer.controlled) not in truths:
                truths[name, peer.controlled] = Truth(case, peer.controlled)
            found = out.transpose(1, 2) if heads_first else out
            where = f"{peer.title} at {shape.name}"
            report = truths[name, peer.controlled].check(where, found, peer.slack)
            del out, found
            memory[label] = peak(prepared[0][0], device)
            errors[label] = report
            calls[label], work[label] = [call for call, _ in prepared], case.shape.flops
    samples = interleaved(calls, device, setup.seconds(SECONDS)) if calls else {}
    return {
        **row,
        "seconds": seconds(samples),
        "replay_seconds": replays({n: c for n, c in calls.items() if _captured(n)}, device) if graphs else {},
        "tflops": rates(samples, work),
        "ratios": rounded(ratios(samples)),
        "errors": errors,
        "memory": {"q_k_v_out": inputs + cases[0].q.numel() * 2, **memory},
        "missing": missing,
        "failures": failures,
    }


def first(prepared: tuple[Callable[[], Tensor], bool], case: Case) -> tuple[Tensor, bool]:
    """A first result; the block that the allocator will hand out for it holds NaN, should parts not be
    written.
    """
    call, heads_first = prepared
    if case.q.device.type == "cuda":
        call()  # compiles, and allocates what it keeps
        poison = torch.full_like(case.q, float("nan"))
        del poison
    return call(), heads_first


def peak(call: Callable[[], Tensor | tuple[Tensor, ...]], device: torch.device) -> Row:
    """Bytes above what was allocated before: at the most within the call, and less its result."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = call()
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device) - before
    output = sum(t.numel() * t.element_size() for t in ((out,) if isinstance(out, Tensor) else out))
    return {"peak": most, "extra": max(most - output, 0)}


def rates(samples: Mapping[str, list[float]], work: Mapping[str, float]) -> dict[str, float]:
    return {n: round(work[n] / timing.spread(s).median / 1e12, 2) for n, s in samples.items() if n in work}


def ratios(samples: Mapping[str, list[float]]) -> dict[str, timing.Spread]:
    """Time over time, round by round, of ours over others': below 1 ours is faster; `vendor`: the fastest
    plain one.
    """
    own = [n for n in OWN if n in samples]
    vendors = [n for n in (*gpu_peers.VENDORS, "flex") if n in samples]
    pairs = [(name, plain) for name in own if (plain := _plain(name)) != name and plain in own]
    pairs += [(name, OWN[name]) for name in CUDA if name in own and OWN[name] in own]
    pairs += [(name, vendor) for name in own for vendor in vendors]
    pairs += [(name, other) for other in samples for name in _counterparts(other) if name in own]
    found = {f"{a}/{b}": timing.ratio(samples, a, b) for a, b in pairs}
    if vendors:
        fastest = min(vendors, key=lambda n: timing.spread(samples[n]).median)
        found |= {f"{name}/vendor": timing.ratio(samples, name, fastest) for name in own}
    return found


def _plain(name: str) -> str:
    return "cuda_plain" if name in CUDA else "plain"


def _counterparts(label: str) -> list[str]:
    """Ours that compute what another form does: composed_groups and eager_groups our groups, composed and
    eager brush.
    """
    kind, _, rest = label.partition("_")
    if kind not in ("composed", "eager"):
        return []
    variant = rest if rest in OWN else "brush"
    return [name for name in OWN if OWN[name] == variant]


def _captured(label: str) -> bool:
    """Whether a graph is tried: the others copy tables from the host, which cannot be captured."""
    return not label.startswith(("composed", "eager"))

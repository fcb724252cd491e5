"""The forward pass on a GPU: each contestant is checked, then all are timed in turns; then peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..cases.contestants import Contestant
from ..cases.float64_check import ExpectedRows
from ..cases.inputs import Case, draw_case
from ..cases.shapes import Shape
from ..timing.device_clock import input_sets, time_on_device, time_replays
from ..timing.rounds import Spread, ratio, spread
from ..timing.rows import Row, describe_shape, ratio_cells, seconds_cells
from . import contestants
from .controls import CUDA, OURS, case_with_control
from .setup import Setup, judged
from .shapes import dry

Entry = tuple[str, Contestant, str]  # its name in the results, the contestant, its control
SECONDS = 2.0  # that the rounds of one row may take


def main_entries(setup: Setup) -> list[Entry]:
    """Every installed plain attention; ours, plain and with In-Context Brush; other forms of the brush."""
    entries: list[Entry] = [(name, vendor, "plain") for name, vendor in contestants.VENDORS.items()]
    own = ("plain", "shift", "brush", "cuda_plain", "cuda_shift", "cuda_brush")
    entries += [(name, contestants.ours_named(setup, name), OURS[name]) for name in own]
    entries += [("composed", contestants.COMPOSED, "brush"), ("eager", contestants.EAGER, "brush")]
    return entries + [(name, c, "brush" if c.controlled else "plain") for name, c in setup.more.items()]


def feature_entries(setup: Setup) -> list[Entry]:
    """Ours with every other control, beside our plain call and other forms of the same controls."""
    names = ("plain", "groups", "contrast", "contrast_linear", "quarter")
    names += ("cuda_plain", "cuda_groups", "cuda_contrast_linear", "cuda_quarter")
    entries: list[Entry] = [(name, contestants.ours_named(setup, name), OURS[name]) for name in names]
    entries += [("cudnn", contestants.VENDORS["cudnn"], "plain")]
    entries += [
        (f"composed_{name}", contestants.COMPOSED, name) for name in ("groups", "contrast_linear", "quarter")
    ]
    return entries + [(f"eager_{name}", contestants.EAGER, name) for name in ("groups", "contrast")]


def compiled_entries(setup: Setup) -> list[Entry]:
    """FlexAttention and composed forms with a compiled merge: torch.compile takes most of their time."""
    entries: list[Entry] = [(name, contestants.ours_named(setup, name), name) for name in ("plain", "brush")]
    entries += [("cudnn", contestants.VENDORS["cudnn"], "plain"), ("flex", contestants.FLEX, "plain")]
    return entries + [(name, form, "brush") for name, form in contestants.composed_forms().items()]


@torch.no_grad()
def measure(setup: Setup, shape: Shape, entries: Iterable[Entry], graphs: bool = False) -> Row:
    """One row of the results.

    A contestant with a wrong result is listed in `failures` and not timed; one that cannot run, in `missing`.

    Args:
        setup: where to run.
        shape: of the inputs; a dry run shrinks it.
        entries: the contestants and their controls.
        graphs: whether calls are also timed within a CUDA graph.
    """
    shape, dtype, device = dry(shape) if setup.dry else shape, torch.bfloat16, setup.device
    inputs = 2 * shape.batch * shape.heads * shape.dim * (shape.n_rows + 2 * shape.n_keys)
    cases = [draw_case(shape, dtype, seed, device) for seed in range(input_sets(device, inputs))]
    row: Row = {"section": "forward", "shape": describe_shape(shape), "dtype": "bfloat16"}
    expected: dict[tuple[str, bool], ExpectedRows] = {}
    controlled: dict[str, list[Case]] = {}
    calls: dict[str, list[Callable[[], Tensor]]] = {}
    errors, missing, failures, memory, work = {}, {}, {}, {}, {}
    for label, contestant, control in entries:
        if control not in controlled:
            controlled[control] = [case_with_control(case, control) for case in cases]
        case, kind = controlled[control][0], (control, contestant.controlled)
        with judged(label, missing, failures, device, ours=label in OURS):
            prepared = [contestant.prepare(c) for c in controlled[control]]
            out, heads_first = first_result(prepared[0], case)
            if kind not in expected:
                expected[kind] = ExpectedRows(case, contestant.controlled)
            found = out.transpose(1, 2) if heads_first else out
            report = expected[kind].check(f"{contestant.title} at {shape.name}", found, contestant.slack)
            del out, found
            memory[label] = peak_memory(prepared[0][0], device)
            errors[label] = report
            calls[label], work[label] = [call for call, _ in prepared], case.shape.flops
    samples = time_on_device(calls, device, setup.seconds(SECONDS)) if calls else {}
    captured = {name: group for name, group in calls.items() if _can_be_captured(name)}
    return {
        **row,
        "seconds": seconds_cells(samples),
        "replay_seconds": time_replays(captured, device) if graphs else {},
        "tflops": tflops(samples, work),
        "ratios": ratio_cells(ratios(samples)),
        "errors": errors,
        "memory": {"q_k_v_out": inputs + cases[0].q.numel() * 2, **memory},
        "missing": missing,
        "failures": failures,
    }


def first_result(prepared: tuple[Callable[[], Tensor], bool], case: Case) -> tuple[Tensor, bool]:
    """A first result, in memory that held NaN before, so that unwritten elements are found."""
    call, heads_first = prepared
    if case.q.device.type == "cuda":
        call()  # compiles, and allocates what it keeps
        poison = torch.full_like(case.q, float("nan"))
        del poison  # the allocator hands its block to the next result
    return call(), heads_first


def peak_memory(call: Callable[[], Tensor | tuple[Tensor, ...]], device: torch.device) -> Row:
    """Bytes allocated within a call: `peak` above what was there before, `extra` without the result."""
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


def tflops(samples: Mapping[str, list[float]], work: Mapping[str, float]) -> dict[str, float]:
    """Rate of each contestant by its median time; `work` is in floating-point operations."""
    return {n: round(work[n] / spread(s).median / 1e12, 2) for n, s in samples.items() if n in work}


def ratios(samples: Mapping[str, list[float]]) -> dict[str, Spread]:
    """Time of ours over time of others, round by round: below 1 ours is faster.

    `vendor` is the plain attention of another library with the shortest median.
    """
    own = [n for n in OURS if n in samples]
    vendors = [n for n in (*contestants.VENDORS, "flex") if n in samples]
    pairs = [(name, plain) for name in own if (plain := _plain(name)) != name and plain in own]
    pairs += [(name, OURS[name]) for name in CUDA if name in own and OURS[name] in own]
    pairs += [(name, vendor) for name in own for vendor in vendors]
    pairs += [(name, other) for other in samples for name in _counterparts(other) if name in own]
    found = {f"{a}/{b}": ratio(samples, a, b) for a, b in pairs}
    if vendors:
        fastest = min(vendors, key=lambda n: spread(samples[n]).median)
        found |= {f"{name}/vendor": ratio(samples, name, fastest) for name in own}
    return found


def _plain(name: str) -> str:
    return "cuda_plain" if name in CUDA else "plain"


def _counterparts(label: str) -> list[str]:
    """Our calls under the same control as a composed or an eager form: brush if its name has none."""
    kind, _, rest = label.partition("_")
    if kind not in ("composed", "eager"):
        return []
    control = rest if rest in OURS else "brush"
    return [name for name in OURS if OURS[name] == control]


def _can_be_captured(label: str) -> bool:
    """Whether a CUDA graph is tried: composed and eager forms copy from the host, which graphs refuse."""
    return not label.startswith(("composed", "eager"))

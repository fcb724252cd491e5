"""`flashbrush bench --tune`: tiles of the forward kernel, timed on this GPU and written to a file of the
user's.

Nothing reads the file before FLASHBRUSH_TILES names it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from ...bindings import backends
from ...bindings.backends.triton import measured_tiles as tiles
from ..cases.shapes import diptych
from ..cases.truth import Truth, WrongResult
from ..cpu.peers import draw
from ..timing import paired as timing
from .machine import Setup, describe
from .peers import mine
from .shapes import vary
from .timing import interleaved, sets

DIMS = (40, 64, 80, 128)
VARIANTS = {
    "plain": (False, False),
    "brush": (False, True),
    "groups": (True, False),
}  # whether grouped, whether with mass
GAIN = 0.98  # of the chosen tile's time: less is not worth a file's entry


def main() -> int:
    """0; 2 without a GPU or without Triton."""
    if reasons := backends()["triton"]:
        print(f"flashbrush bench --tune: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("flashbrush bench --tune: no GPU is visible to torch", file=sys.stderr)
        return 2
    setup = Setup(torch.device("cuda", torch.cuda.current_device()), "triton")
    gpu = torch.cuda.get_device_name(setup.device)
    major, minor = torch.cuda.get_device_capability(setup.device)
    path = tiles.default_path(gpu)
    found: dict[tiles.Kind, tiles.Tile] = {}
    report: list[dict[str, object]] = []
    for dim, (variant, (grouped, mass)) in ((d, v) for d in DIMS for v in VARIANTS.items()):
        kind = tiles.Kind(dim, 2, grouped, mass)
        tried = tiles.candidates(10 * major + minor, kind)
        samples = measure(setup, kind, variant, tried)
        best = choose(tried, samples)
        default, now = (
            timing.spread(samples[t]).median * 1e3 if t in samples else None for t in (tried[0], best)
        )
        shown = (f"{t:.4g} ms" if t is not None else "did not run" for t in (default, now))
        print(
            f"D {dim}, {variant}: {' -> '.join(shown)}; {len(samples)} of {len(tried)} ran; {best}",
            flush=True,
        )
        report.append(
            {**kind._asdict(), "default_ms": default, "ms": now, "ran": len(samples), "tried": len(tried)}
        )
        if best != tried[0]:
            found[kind] = best
        tiles.write(path, gpu, found, {"machine": describe(setup), "timed": report})
    print(f"written: {path}; FLASHBRUSH_TILES={path} makes calls use it")
    return 0


def choose(tried: Sequence[tiles.Tile], samples: Mapping[tiles.Tile, list[float]]) -> tiles.Tile:
    """The fastest tile, where it beats the first one, which is the default, by more than the rounds' spread;
    else that.
    """
    if not samples:
        return tried[0]
    fastest = min(samples, key=lambda tile: timing.spread(samples[tile]).median)
    if tried[0] not in samples:
        return fastest
    ratio = timing.spread([a / b for a, b in zip(samples[fastest], samples[tried[0]], strict=True)])
    return fastest if ratio.median < GAIN and ratio.q3 < 1 else tried[0]


@torch.no_grad()
def measure(
    setup: Setup, kind: tiles.Kind, variant: str, tried: Sequence[tiles.Tile]
) -> dict[tiles.Tile, list[float]]:
    """Seconds of each tile that compiles, fits the GPU and is right, at FLUX's diptych with the kind's head
    dim.
    """
    shape = diptych(f"tune-{kind.dim}", 24, 512, 2304, kind.dim)
    inputs = 6 * shape.heads * shape.dim * shape.n_rows
    cases = [
        vary(draw(shape, torch.bfloat16, i, setup.device), variant) for i in range(sets(setup.device, inputs))
    ]
    truth, peer = Truth(cases[0], variant != "plain"), mine(setup, variant)
    calls: dict[tiles.Tile, list[Callable[[], object]]] = {}
    for tile in tried:
        prepared = [functools.partial(_on_trial, tile, peer.prepare(case)[0]) for case in cases]
        try:
            truth.check(f"{variant} with {tile}", prepared[0](), peer.slack)
        except WrongResult as wrong:
            print(f"  left out: {wrong}", file=sys.stderr)
        except Exception as error:  # a compiler has many ways to say that a tile does not fit
            print(f"  left out: {tile}: {type(error).__name__}: {_first_line(error)}", file=sys.stderr)
        else:
            calls[tile] = list(prepared)
    named = {str(tile): group for tile, group in calls.items()}
    samples = interleaved(named, setup.device, setup.seconds(1.5)) if named else {}
    return {tile: samples[str(tile)] for tile in calls}


def _on_trial(tile: tiles.Tile, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    with tiles.trial(tile):
        return call()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")

"""Tiles that were measured on a GPU, in place of those that the pure functions choose: only where a user asks
for them.

FLASHBRUSH_TILES names the file, which `flashbrush bench --tune` writes. Without the variable nothing is read.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ....kernels.attention import tiles as attention_tiles
from ....kernels.attention.tiles import Tile
from . import launch as triton_launch

VARIABLE = "FLASHBRUSH_TILES"
SCHEMA = 1
MOST = 24  # candidates of one kind of call
SIDES = (16, 32, 64, 128, 256)
WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3, 4, 5)


class Kind(NamedTuple):
    """The calls that share a tile."""

    dim: int
    itemsize: int
    grouped: bool = False
    mass: bool = False


def forward_tile(
    device: torch.device, dim: int, itemsize: int, grouped: bool, mass: int, lanes: bool = False
) -> Tile:
    """The one on trial, or measured on this GPU, or attention_tiles'. Calls with lanes are not measured.

    Raises:
        ValueError: FLASHBRUSH_TILES names a file that is not there or not sound.
    """
    if _trial is not None:
        return _trial
    if not lanes and (path := os.environ.get(VARIABLE)):
        measured = _of_device(path, device).get(Kind(dim, itemsize, grouped, mass > 0))
        if measured is not None:
            return measured
    return attention_tiles.forward_tile(triton_launch.arch(device), dim, itemsize, grouped, mass, lanes)


_trial: Tile | None = None


@contextlib.contextmanager
def trial(tile: Tile) -> Iterator[None]:
    """All forward calls of this process take one tile, and no file is read: for the tuner."""
    global _trial
    before, _trial = _trial, tile
    try:
        yield
    finally:
        _trial = before


def candidates(arch: int, kind: Kind) -> list[Tile]:
    """attention_tiles' choice first, then its neighbours, nearest first, that shared memory and registers can
    hold.

    Args:
        arch: compute capability * 10.
    """
    chosen = attention_tiles.forward_tile(arch, kind.dim, kind.itemsize, kind.grouped, int(kind.mass))
    width = sum(attention_tiles.split_dim(kind.dim, kind.itemsize))
    shared = (227 if arch == 90 or 100 <= arch < 120 else 99 if arch in (86, 89, 120) else 163) << 10

    def fits(tile: Tile) -> bool:
        in_flight = (tile.block_m + 2 * tile.stages * tile.block_n) * width * kind.itemsize
        # Of 255 registers a thread: the accumulators (one for each group's sum), and a tile of logits.
        held = tile.block_m * (width * (1 + kind.grouped) + tile.block_n) / (32 * tile.warps)
        return in_flight <= shared and held <= 224

    def distance(tile: Tile) -> int:
        steps = [abs(a.bit_length() - b.bit_length()) for a, b in zip(tile[:3], chosen[:3], strict=True)]
        options = sum(a != b for a, b in zip(tile[4:], chosen[4:], strict=True))
        return sum(steps) + abs(tile.stages - chosen.stages) + options

    # Tensor descriptors need powers of two, and a GPU that has them; warps specialise on what descriptors
    # bring.
    described = arch >= 90 and kind.dim >= 16 and kind.dim & (kind.dim - 1) == 0
    options = [(d, p, s) for d in (False, described) for p in (False, True) for s in (False, d)]
    every = itertools.product(
        (32, 64, 128, 256), (16, 32, 64, 128), (4, 8), (2, 3, 4), dict.fromkeys(options)
    )
    tiles = (Tile(m, n, warps, stages, *more) for m, n, warps, stages, more in every)
    near = [tile for tile in tiles if tile != chosen and fits(tile)]
    return [chosen, *sorted(near, key=lambda tile: (distance(tile), tile))][:MOST]


def default_path(gpu: str) -> Path:
    """What FLASHBRUSH_TILES names, or a file of this GPU in the user's cache folder."""
    if path := os.environ.get(VARIABLE):
        return Path(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "flashbrush" / f"tiles-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def write(path: Path, gpu: str, found: Mapping[Kind, Tile], about: Mapping[str, object]) -> None:
    """about: versions and times, for the reader of the file alone."""
    entries = [{**kind._asdict(), "tile": tile._asdict()} for kind, tile in found.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA, "gpu": gpu, "forward": entries, "about": about}, indent=1)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text + "\n")
    os.replace(scratch, path)  # whole or not at all


def read(path: Path) -> tuple[str, dict[Kind, Tile]]:
    """The GPU's name, and the tiles.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    where = f"{VARIABLE}: {path}"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        got = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{where}: expected schema {SCHEMA}, got {got}")
    if not isinstance(content.get("gpu"), str) or not isinstance(content.get("forward"), list):
        raise ValueError(f"{where}: expected a string 'gpu' and a list 'forward'")
    tiles: dict[Kind, Tile] = {}
    for i, entry in enumerate(content["forward"]):
        tile = entry.get("tile") if isinstance(entry, dict) else None
        if (
            not isinstance(tile, dict)
            or set(entry) != {*Kind._fields, "tile"}
            or set(tile) != {*Tile._fields}
        ):
            raise ValueError(
                f"{where}: forward[{i}]: expected {', '.join(Kind._fields)} and a tile of {', '.join(Tile._fields)}"
            )
        kind = {name: entry[name] for name in Kind._fields}
        for name, allowed in (
            ("dim", range(1, 257)),
            ("itemsize", (2, 4)),
            ("grouped", (False, True)),
            ("mass", (False, True)),
        ):
            _check(f"{where}: forward[{i}].{name}", kind[name], allowed)
        for name, allowed in (
            ("block_m", SIDES),
            ("block_n", SIDES),
            ("warps", WARPS),
            ("stages", STAGES),
            *((name, (False, True)) for name in ("descriptors", "persistent", "specialized")),
        ):
            _check(f"{where}: forward[{i}].tile.{name}", tile[name], allowed)
        tiles[Kind(**kind)] = Tile(**tile)
    return content["gpu"], tiles


def _check(name: str, value: object, allowed: range | tuple) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:
        expected = (
            f"{allowed[0]} to {allowed[-1]}"
            if isinstance(allowed, range)
            else f"one of {', '.join(map(str, allowed))}"
        )
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


_read_once = functools.lru_cache(maxsize=8)(read)


@functools.lru_cache(maxsize=64)
def _of_device(path: str, device: torch.device) -> dict[Kind, Tile]:
    """Read once for each device; none where the file is another GPU's."""
    gpu, tiles = _read_once(Path(path))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if name == gpu:
        return tiles
    warnings.warn(f"flashbrush: {VARIABLE} holds tiles of {gpu!r}, not of {name!r}: not used", stacklevel=2)
    return {}

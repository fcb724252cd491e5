"""Tiles that are measured instead of chosen: what is tried, what is kept, what is written and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flashbrush.benchmarks.cpu import table
from flashbrush.benchmarks.gpu import tune
from flashbrush.bindings.backends.triton import measured_tiles as tiles
from flashbrush.bindings.backends.triton.measured_tiles import Kind
from flashbrush.kernels.attention import tiles as attention_tiles
from flashbrush.kernels.attention.tiles import Tile

KINDS = [
    Kind(dim, itemsize, grouped, mass)
    for dim in (32, 40, 64, 80, 96, 128, 160, 256)
    for itemsize in (2, 4)
    for grouped in (False, True)
    for mass in (False, True)
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tiles.VARIABLE, raising=False)
    tiles._read_once.cache_clear()
    tiles._of_device.cache_clear()


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_candidates(arch: int) -> None:
    for kind in KINDS:
        found = tiles.candidates(arch, kind)
        chosen = attention_tiles.forward_tile(arch, kind.dim, kind.itemsize, kind.grouped, int(kind.mass))
        assert found[0] == chosen and 1 < len(set(found)) == len(found) <= tiles.MOST
        assert found == tiles.candidates(arch, kind)
        for tile in found:
            assert tile.block_m in tiles.SIDES and tile.block_n in tiles.SIDES
            assert tile.warps in tiles.WARPS and tile.stages in tiles.STAGES
            assert not tile.descriptors or (arch >= 90 and kind.dim in (16, 32, 64, 128, 256))


def test_candidates_leave_out_what_does_not_fit() -> None:
    """128 KiB of keys and values in flight at D 128 are too much for a GPU with 99."""
    wide = Tile(128, 64, 8, 4)
    assert wide in tiles.candidates(90, Kind(128, 2)) and wide not in tiles.candidates(86, Kind(128, 2))


def test_round_trip(tmp_path: Path) -> None:
    found = {Kind(128, 2): Tile(128, 64, 8, 3, True), Kind(40, 2, True, False): Tile(64, 32, 4, 2)}
    path = tmp_path / "deep" / "tiles.json"
    tiles.write(path, "NVIDIA H200", found, {"note": 1})
    assert tiles.read(path) == ("NVIDIA H200", found)
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]


def edited(**changes: object) -> dict:
    entry = {"dim": 64, "itemsize": 2, "grouped": False, "mass": False, "tile": Tile(128, 64, 8, 3)._asdict()}
    for name, value in changes.items():
        if name in entry:
            entry[name] = value
        else:
            entry["tile"] = {**entry["tile"], name: value}
    return {"schema": 1, "gpu": "cpu", "forward": [entry]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "expected schema 1, got list"),
        ({"schema": 2}, "expected schema 1, got 2"),
        ({"schema": 1, "gpu": 3, "forward": []}, "string 'gpu'"),
        ({"schema": 1, "gpu": "cpu"}, "list 'forward'"),
        ({"schema": 1, "gpu": "cpu", "forward": ["x"]}, r"forward\[0\]: expected dim"),
        (edited(more=1), "a tile of block_m"),
        (edited(tile=None), "a tile of block_m"),
        (edited(dim=0), "dim: expected 1 to 256, got 0"),
        (edited(itemsize=8), "itemsize: expected one of 2, 4, got 8"),
        (edited(grouped=1), "grouped: expected one of False, True, got 1"),
        (edited(block_m=100), "tile.block_m: expected one of 16, 32"),
        (edited(block_n=True), "tile.block_n"),
        (edited(warps=3), "tile.warps: expected one of"),
        (edited(stages=0), "tile.stages"),
        (edited(descriptors="yes"), "tile.descriptors"),
    ],
)
def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    with pytest.raises(ValueError, match=message) as caught:
        tiles.forward_tile(CPU, 64, 2, False, 0)
    assert str(path) in str(caught.value) and tiles.VARIABLE in str(caught.value)


def test_a_file_is_read_once_and_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = attention_tiles.forward_tile(0, 64, 2)
    path = tmp_path / "tiles.json"
    tiles.write(path, "cpu", {Kind(64, 2): Tile(64, 32, 4, 2)}, {})
    assert tiles.forward_tile(CPU, 64, 2, False, 0) == chosen
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    assert tiles.forward_tile(CPU, 64, 2, False, 0) == Tile(64, 32, 4, 2) != chosen
    assert tiles.forward_tile(CPU, 64, 2, False, 4) == attention_tiles.forward_tile(0, 64, 2, False, 4)
    path.unlink()
    assert tiles.forward_tile(CPU, 64, 2, False, 0) == Tile(64, 32, 4, 2)
    monkeypatch.setenv(tiles.VARIABLE, str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match="No such file"):
        tiles.forward_tile(CPU, 64, 2, False, 0)


def test_another_gpu_s_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    tiles.write(path, "NVIDIA H200", {Kind(64, 2): Tile(64, 32, 4, 2)}, {})
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    with pytest.warns(UserWarning, match="'NVIDIA H200', not of 'cpu'"):
        assert tiles.forward_tile(CPU, 64, 2, False, 0) == attention_tiles.forward_tile(0, 64, 2)


def test_a_trial_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiles.VARIABLE, str(tmp_path / "nothing.json"))
    with tiles.trial(Tile(16, 16, 4, 2)):
        assert tiles.forward_tile(CPU, 64, 2, False, 0) == Tile(16, 16, 4, 2)
    with pytest.raises(ValueError, match="No such file"):
        tiles.forward_tile(CPU, 64, 2, False, 0)


def test_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiles.default_path("NVIDIA H200") == tmp_path / "flashbrush" / "tiles-nvidia-h200.json"
    monkeypatch.setenv(tiles.VARIABLE, "mine.json")
    assert tiles.default_path("NVIDIA H200") == Path("mine.json")


def test_only_a_clear_gain_is_kept() -> None:
    default, other, third = Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)
    tried = [default, other, third]
    assert tune.choose(tried, {default: [1.0] * 4, other: [0.9] * 4, third: [0.95] * 4}) == other
    assert tune.choose(tried, {default: [1.0] * 4, other: [0.99] * 4}) == default
    assert tune.choose(tried, {default: [1.0] * 4, other: [0.5, 0.9, 1.5, 1.6]}) == default
    assert tune.choose(tried, {third: [2.0], other: [1.0]}) == other  # the default does not run here
    assert tune.choose(tried, {}) == default


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys) -> None:
    assert table.main(["--tune"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("flashbrush bench --tune: ") and said.err.count("\n") == 1 and not said.out

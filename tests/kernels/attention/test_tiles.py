"""The forward kernel takes the tile that a file names, and is right with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flashbrush as fb
from flashbrush.bindings.backends.triton import attention as backend, measured_tiles as tiles
from flashbrush.bindings.backends.triton.measured_tiles import Kind
from flashbrush.kernels.attention.tiles import Tile

pytestmark = pytest.mark.skipif(bool(backend.available()), reason="; ".join(backend.available()))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_measured_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    tiles.write(
        path, name, {Kind(16, 4): Tile(32, 16, 4, 2), Kind(16, 4, False, True): Tile(16, 32, 4, 2)}, {}
    )
    q, k, v = (torch.randn(1, 70, 2, 16, device=DEVICE) for _ in range(3))
    plain, stats = fb.attention(q, k, v, backend="triton", return_stats=True)
    seen = []
    take = backend._tile
    monkeypatch.setattr(backend, "_tile", lambda *args: seen.append(take(*args)) or seen[-1])
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    out = fb.attention(q, k, v, backend="triton")
    again, measured = fb.attention(q, k, v, backend="triton", return_stats=True)
    assert [tile[:2] for tile in seen] == [(32, 16), (16, 32)]
    assert torch.allclose(out, plain, atol=1e-5) and torch.allclose(again, plain, atol=1e-5)
    assert torch.allclose(measured.lse, stats.lse, atol=1e-5) and torch.allclose(
        measured.mass, stats.mass, atol=1e-4
    )

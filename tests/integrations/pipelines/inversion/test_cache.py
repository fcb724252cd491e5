"""Inversions on disk: read back bitwise, written completely or not at all, never confused with others."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flashbrush.integrations.pipelines.inversion.cache import (
    InversionCache,
    WeightsDigest,
    default_folder,
    tensor_digest,
    weights_digest,
)
from flashbrush.integrations.pipelines.inversion.ddpm import Inversion

SETTINGS = {"pixels": "abc", "steps": 4, "eta": 1.0, "prompts": ["", "a"]}


def inversion(seed: int = 0) -> Inversion:
    generator = torch.Generator().manual_seed(seed)
    latents, maps = (
        torch.randn(1, 4, 4, 8, 8, generator=generator),
        torch.randn(1, 3, 4, 8, 8, generator=generator),
    )
    return Inversion(latents, maps, 1)


def same(a: Inversion | None, b: Inversion) -> bool:
    return (
        a is not None
        and torch.equal(a.latents, b.latents)
        and torch.equal(a.noise_maps, b.noise_maps)
        and a.skip == b.skip
    )


def test_inversions_are_read_back_bitwise(tmp_path: Path) -> None:
    cache = InversionCache(tmp_path / "new" / "folder")
    assert cache.get(SETTINGS) is None and not cache.folder.exists()
    path = cache.put(SETTINGS, inversion())
    assert [p.name for p in cache.folder.iterdir()] == [path.name] and path == cache.path(SETTINGS)
    assert same(InversionCache(cache.folder).get(dict(reversed(SETTINGS.items()))), inversion())


def test_get_or_make_makes_once(tmp_path: Path) -> None:
    cache, made = InversionCache(tmp_path), []

    def make() -> Inversion:
        made.append(1)
        return inversion()

    for _ in range(3):
        assert same(cache.get_or_make(SETTINGS, make), inversion())
    assert made == [1]


@pytest.mark.parametrize(
    "change", [{"steps": 5}, {"pixels": "abd"}, {"eta": 0.9}, {"prompts": ["", "b"]}, {"more": 1}]
)
def test_other_settings_find_nothing(tmp_path: Path, change: dict) -> None:
    cache = InversionCache(tmp_path)
    cache.put(SETTINGS, inversion())
    assert cache.get(SETTINGS | change) is None


def damaged_files(path: Path, cache: InversionCache) -> dict[str, bytes]:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    other = cache.put(SETTINGS | {"steps": 9}, inversion(1)).read_bytes()
    save_file(load_file(path), path)
    bare = path.read_bytes()
    return {
        "cut off": whole[:-9],
        "empty": b"",
        "a bit": bytes(flipped),
        "another's": other,
        "without a word": bare,
    }


@pytest.mark.parametrize("damage", ["cut off", "empty", "a bit", "another's", "without a word"])
def test_a_damaged_file_is_ignored_with_a_warning(tmp_path: Path, damage: str) -> None:
    cache = InversionCache(tmp_path)
    path = cache.put(SETTINGS, inversion())
    path.write_bytes(damaged_files(path, cache)[damage])
    with pytest.warns(UserWarning, match=f"{path.name} is computed again"):
        assert same(cache.get_or_make(SETTINGS, lambda: inversion(2)), inversion(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cache.get(SETTINGS), inversion(2))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = InversionCache(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            cache.put(SETTINGS, inversion())
    assert list(tmp_path.iterdir()) == []
    cache.put(SETTINGS, inversion())
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            cache.put(SETTINGS, inversion(1))
    assert same(cache.get(SETTINGS), inversion())


def test_default_folder_is_in_the_user_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert InversionCache().folder == default_folder() == tmp_path / "flashbrush" / "inversions"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "flashbrush" / "inversions"


def test_tensor_digests_depend_on_shape_dtype_and_every_bit() -> None:
    x = torch.arange(6.0)
    assert tensor_digest([x]) == tensor_digest([x.clone()]) == tensor_digest([torch.stack([x, x], 1)[:, 0]])
    nearly = x.clone()
    nearly[5] = torch.nextafter(x[5], torch.tensor(9.0))
    others = [x.reshape(2, 3), x.double(), x.view(torch.int32), nearly, x.flip(0)]
    assert len({tensor_digest([t]) for t in [x, *others]}) == 6
    assert tensor_digest([x.bfloat16()]) != tensor_digest([x.half()])


def test_weights_digest_depends_on_weights_and_adapters() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    digest = WeightsDigest()
    first = digest(model)
    assert first == weights_digest(model) == digest(model)

    def changed() -> bool:
        now = digest(model)
        assert now == weights_digest(model)
        return now != first

    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    assert changed()
    with torch.no_grad():
        model[0].weight[0, 0] -= 1e-3
    model[0].scaling = {"style": 0.5}  # as an adapter has it
    assert changed()
    del model[0].scaling
    model.double()
    assert changed()


def test_the_digest_is_computed_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashbrush.integrations.pipelines.inversion import cache as module

    computed = []
    monkeypatch.setattr(module, "weights_digest", lambda *models: computed.append(1) or str(len(computed)))
    model, digest = nn.Linear(3, 3), WeightsDigest()
    assert [digest(model) for _ in range(3)] == ["1"] * 3
    model.bias.data = model.bias.data.clone()
    assert digest(model) == "2" and digest(nn.Linear(3, 3)) == "3"


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cache: the weight (weight|bias) is not in memory"):
        WeightsDigest()(nn.Linear(2, 2, device="meta"))

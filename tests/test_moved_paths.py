"""Import paths of version 0.1 that moved still give the module, with a warning that names the new path."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from flashbrush import _moved_paths

NEEDS_TRITON = tuple(old for old in _moved_paths.MOVED if old.startswith("kernels"))


@pytest.mark.parametrize("old", _moved_paths.MOVED)
def test_an_old_path_gives_the_moved_module(old: str) -> None:
    pytest.importorskip("diffusers")
    if old in NEEDS_TRITON:
        pytest.importorskip("triton")
    new = _moved_paths.MOVED[old]
    sys.modules.pop(f"flashbrush.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"flashbrush.{old} is flashbrush.{new} now"):
        module = importlib.import_module(f"flashbrush.{old}")
    assert module is importlib.import_module(f"flashbrush.{new}")
    assert module.__spec__ is not None
    assert module.__name__ == module.__spec__.name == f"flashbrush.{new}"


def test_names_can_be_imported_from_an_old_path() -> None:
    code = "from flashbrush.integrations.diffusers.plan import Plan; print(Plan.__module__)"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "flashbrush.integrations.diffusers.protocol.plan", done.stderr
    assert "DeprecationWarning" in done.stderr


def test_an_unknown_path_is_still_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flashbrush.bindings.no_such_file")

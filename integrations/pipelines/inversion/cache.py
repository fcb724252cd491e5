"""Inverted latents on disk, in files named by a hash of all settings that decide them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .ddpm import Inversion

VERSION = 1  # increased when the file's format or the inversion's result changes
# Attributes through which adapters and FreeU change a module's output at the same weights.
BEHAVIOUR = ("active_adapters", "disable_adapters", "merged_adapters", "scaling", "s1", "s2", "b1", "b2")


class InversionCache:
    """A folder of inversions, one safetensors file each; later runs read them instead of inverting again.

    A file is written under another name and renamed when complete, so that no process reads a part of one. On
    reading, settings and digest are compared with those in the file; if they differ, the file is ignored with
    a warning.

    Args:
        folder: created when the first file is written; None: default_folder().
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder)

    def path(self, settings: Mapping[str, Any]) -> Path:
        """The file of the inversion with these settings."""
        return self.folder / f"{hashlib.sha256(_text(settings).encode()).hexdigest()}.safetensors"

    def get(self, settings: Mapping[str, Any]) -> Inversion | None:
        """Read an inversion.

        Args:
            settings: all that decides the result, of JSON's types: strings, numbers, lists, dicts.

        Returns:
            The inversion, on the CPU; None where there is none, or, with a warning, where its file is
            damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(settings)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                latents, maps = file.get_tensor("latents"), file.get_tensor("noise_maps")
        except (SafetensorError, OSError) as error:
            return _damaged(path, str(error))
        if about.get("settings") != _text(settings):
            return _damaged(path, "it was made with other settings")
        if about.get("digest") != tensor_digest([latents, maps]):
            return _damaged(path, "its tensors are not those that were written")
        return Inversion(latents, maps, int(about["skip"]))

    def put(self, settings: Mapping[str, Any], inversion: Inversion) -> Path:
        """Write an inversion.

        Args:
            settings: as in get().
            inversion: what to write.

        Returns:
            The file's path.

        Raises:
            OSError: the folder cannot be created or written to.
        """
        from safetensors.torch import save_file

        latents, maps = inversion.latents.cpu().contiguous(), inversion.noise_maps.cpu().contiguous()
        about = {
            "settings": _text(settings),
            "digest": tensor_digest([latents, maps]),
            "skip": str(inversion.skip),
        }
        path = self.path(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".writing-") as scratch:
            draft = Path(scratch) / path.name
            save_file({"latents": latents, "noise_maps": maps}, draft, about)
            os.replace(draft, path)
        return path

    def get_or_make(self, settings: Mapping[str, Any], make: Callable[[], Inversion]) -> Inversion:
        """The inversion with these settings; where there is none, what `make` returns, which is written."""
        if (kept := self.get(settings)) is not None:
            return kept
        made = make()
        self.put(settings, made)
        return made


def default_folder() -> Path:
    """flashbrush/inversions in the user's cache folder, which is XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashbrush" / "inversions"


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors' shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        flat = t.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()


def weights_digest(*modules: nn.Module) -> str:
    """SHA-256 of models' weights and buffers, and of the attributes that adapters and FreeU set.

    Raises:
        ValueError: weights that are not in memory, as with sequential offloading.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, t in sorted(module.state_dict(keep_vars=True).items()):
            if t.is_meta:
                raise ValueError(
                    f"cache: the weight {name} is not in memory, so the model cannot be identified; "
                    "invert without a cache, or offload whole models"
                )
            digest.update(f"{name}:{tensor_digest([t])};".encode())
        digest.update(repr(_behaviour(module)).encode())
    return digest.hexdigest()


class WeightsDigest:
    """weights_digest that is computed again only when a tensor of the modules has changed."""

    def __init__(self) -> None:
        self._tensors: list[weakref.ref[Tensor]] = []
        self._state: tuple = ()
        self._digest = ""

    def __call__(self, *modules: nn.Module) -> str:
        """The digest of the modules, see weights_digest."""
        tensors = [t for module in modules for t in module.state_dict(keep_vars=True).values()]
        if any(t.is_inference() for t in tensors):  # without a count of their changes
            return weights_digest(*modules)
        state = (
            [(t.data_ptr(), t._version, t.dtype, tuple(t.shape)) for t in tensors],
            [_behaviour(module) for module in modules],
        )
        # Objects are compared too: a new model may have the address of a freed one.
        same = len(tensors) == len(self._tensors) and all(
            ref() is t for ref, t in zip(self._tensors, tensors)
        )
        if not same or state != self._state:
            self._digest = weights_digest(*modules)
            self._tensors, self._state = [weakref.ref(t) for t in tensors], state
        return self._digest


def _behaviour(module: nn.Module) -> list[tuple[str, str, str]]:
    found = []
    for name, part in module.named_modules():
        for key in BEHAVIOUR:
            if isinstance(value := getattr(part, key, None), (bool, int, float, str, list, tuple, dict)):
                found.append((name, key, repr(value)))
    return found


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps({"version": VERSION, **settings}, sort_keys=True)


def _damaged(path: Path, reason: str) -> None:
    warnings.warn(f"flashbrush: the cached inversion {path} is computed again: {reason}", stacklevel=4)

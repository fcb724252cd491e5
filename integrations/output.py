"""Pictures on disk: their names are checked before the work, and they appear when all of them are complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def check_pictures(paths: Mapping[str, Path | None], suffixes: Sequence[str] = SUFFIXES) -> None:
    """Whether pictures, or files of other `suffixes`, can be written.

    Args:
        paths: how errors call each, and where it goes; None: nowhere.

    Raises:
        ValueError: a folder, a folder that does not exist or cannot be written to, a name with another ending, or one file
            twice.
    """
    taken: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        folder = path.absolute().parent
        if path.is_dir():
            raise ValueError(f"{name}: expected a file to write, got a folder: {path}")
        if not folder.is_dir():
            raise ValueError(f"{name}: no such folder: {folder}")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{name}: not allowed to write to the folder {folder}")
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"{name}: expected a name that ends in one of {', '.join(suffixes)}, got {path.name!r}")
        if other := taken.get(path.resolve()):
            raise ValueError(f"{name}: expected another file than {other}, got {path} for both")
        taken[path.resolve()] = name


def write_pictures(pictures: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write each picture by calling its value with a path; all are complete before the first takes its name.

    Raises:
        What the calls raise; then nothing is written.
    """
    with ExitStack() as scratch:
        drafts = []
        for path, write in pictures.items():
            # Beside the target, so that taking its name is one operation of the file system.
            folder = scratch.enter_context(tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".flashbrush-"))
            draft = Path(folder) / path.name
            write(draft)
            drafts.append(draft)
        for draft, path in zip(drafts, pictures, strict=True):
            os.replace(draft, path)

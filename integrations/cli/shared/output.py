"""Files and tables of a command: names are checked before the work, files appear when all are complete."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def check_pictures(
    paths: Mapping[str, Path | None],
    suffixes: Sequence[str] = SUFFIXES,
    *,
    read: Mapping[str, str | Path | None] | None = None,
) -> None:
    """Check that pictures can be written.

    Args:
        paths: where each is to be written, by the name that errors give it; None: nowhere.
        suffixes: allowed endings of file names.
        read: files that the command reads, by name: they must not be overwritten.

    Raises:
        ValueError: a path is a folder, its folder does not exist or cannot be written to, the name has
            another ending, or the file is named twice or read.
    """
    taken = {Path(path).resolve(): name for name, path in (read or {}).items() if path is not None}
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
            raise ValueError(
                f"{name}: expected a name that ends in one of {', '.join(suffixes)}, got {path.name!r}"
            )
        if other := taken.get(path.resolve()):
            raise ValueError(f"{name}: expected another file than {other}, got {path} for both")
        taken[path.resolve()] = name


def check_folder(name: str, path: Path | None) -> None:
    """Raise ValueError if `path` is a file; `name` is what the error calls it."""
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(f"{name}: expected a folder, got a file: {path}")


def check_packages(user: str, *packages: str) -> None:
    """Raise ImportError for the first of `packages` that is not installed; `user` names what needs it."""
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(f"{user} needs {package}, which is not installed")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str, width: int = 120) -> None:
    """Print a table as wide as the terminal, or `width` characters wide into a file or pipe."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width, highlight=False).print(table)


def write_pictures(pictures: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files together: all are complete before the first takes its name.

    Args:
        pictures: by path, a call that writes the file to the path that it gets.

    Raises:
        Exception: what a call raises; then nothing is written.
    """
    with ExitStack() as scratch:
        drafts = []
        for path, write in pictures.items():
            # In the target's own folder: renaming is then one operation of the file system.
            folder = scratch.enter_context(
                tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".flashbrush-")
            )
            draft = Path(folder) / path.name
            write(draft)
            drafts.append(draft)
        for draft, path in zip(drafts, pictures, strict=True):
            os.replace(draft, path)

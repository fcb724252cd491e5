"""What commands leave: names and packages are checked before the work; pictures appear when all are complete;
tables.
"""

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
    """Whether pictures, or files of other `suffixes`, can be written.

    Args:
        paths: how errors call each, and where it goes; None: nowhere.
        read: the same for the files that the command reads.

    Raises:
        ValueError: a folder, a folder that does not exist or cannot be written to, a name with another
            ending, one file twice, or a file that is read.
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
    """ValueError where `path` is there and no folder; `name` is how the error calls it."""
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(f"{name}: expected a folder, got a file: {path}")


def check_packages(user: str, *packages: str) -> None:
    """ImportError for the first of `packages` that is not installed; `user` is what needs it."""
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(f"{user} needs {package}, which is not installed")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str, width: int = 120) -> None:
    """A table on the screen, or `width` characters wide in a file or pipe."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width, highlight=False).print(table)


def write_pictures(pictures: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write each picture by calling its value with a path; all are complete before the first takes its name.

    Raises:
        What the calls raise; then nothing is written.
    """
    with ExitStack() as scratch:
        drafts = []
        for path, write in pictures.items():
            # Beside the target, so that taking its name is one operation of the file system.
            folder = scratch.enter_context(
                tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".flashbrush-")
            )
            draft = Path(folder) / path.name
            write(draft)
            drafts.append(draft)
        for draft, path in zip(drafts, pictures, strict=True):
            os.replace(draft, path)

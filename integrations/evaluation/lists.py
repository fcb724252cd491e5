"""The CSV file that lists what is in a folder of items."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path


def read_list(path: Path, what: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of `path`; "" where a row ends early.

    Args:
        what: how errors call the rows. columns: those that have to be there, of which "name" is one.

    Raises:
        FileNotFoundError: no such file. ValueError: no rows, a column is missing, or a name appears twice.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: expected a list of {what}, {path}, with the columns {', '.join(columns)}"
        )
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, restval=""))
    if not rows:
        raise ValueError(f"folder: {path} lists nothing")
    if missing := [name for name in columns if name not in rows[0]]:
        raise ValueError(f"folder: {path} has no column {', '.join(missing)}")
    names = [row["name"] for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"folder: {path} names {', '.join(twice)} twice")
    return rows

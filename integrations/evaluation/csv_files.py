"""CSV files: reading the list of a folder of items, writing tables of results."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_list(path: Path, what: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the list of a folder's items.

    Args:
        path: of the CSV file.
        what: what errors call the rows.
        columns: required ones; "name" is among them.

    Returns:
        The rows; a field is "" where a row ends early.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows, a column is missing, or a name appears twice.
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


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV: the columns of all rows in order of first appearance; floats with six digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )

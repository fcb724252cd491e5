"""Shared libraries of ours, and why one is not there."""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path

REPORT = Path(__file__).with_name("build_report.json")


@functools.cache
def build_report() -> dict:
    """What was built at installation, how, and what went wrong (setup.py); empty where there is no report."""
    return json.loads(REPORT.read_text()) if REPORT.exists() else {}


def open_library(path: Path, part: str | None = None) -> tuple[ctypes.CDLL | None, str]:
    """(library, the reason why there is none). part: of the build's report; None: all of it."""
    if not path.exists():
        report = build_report() if part is None else build_report().get(part, {})
        return None, f"the shared library was not built: {report.get('error') or 'no reason recorded'}"
    try:
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        return None, f"the shared library does not load: {error}"

"""The command line as a whole: help is quick, and the root's __main__ adds bench."""

from __future__ import annotations

import subprocess
import sys

from ..command import flashbrush


def test_bench_prints_a_table_and_refuses_unknown_shapes(capsys) -> None:
    arguments = [
        "--quick",
        "--shapes",
        "quick-diptych-d64",
        "--dtypes",
        "float32",
        "--sections",
        "forward",
        "--repeats",
        "1",
    ]
    code, out, err = flashbrush(capsys, "bench", *arguments)
    assert code == 0, err
    assert "SDPA" in out and "eager" in out
    code, _, err = flashbrush(capsys, "bench", "--shapes", "round")
    assert code == 2 and err.startswith("flashbrush: --shapes: unknown round") and len(err.splitlines()) == 1


def test_help_is_quick_and_module_runs() -> None:
    code = (
        "import sys; from flashbrush import __main__ as cli\n"
        "try: cli.main(['insert', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-m", "flashbrush", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "insert" in done.stdout

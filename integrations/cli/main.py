"""The command line: flashbrush insert, edit, inspect, vicl, eval, sweep, demo, info, bench.

Wrong input gives one line on standard error and exit code 2, and nothing is written.
"""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import typer

from .demo import demo
from .edit import edit
from .eval_insert import eval_insert
from .eval_vicl import eval_vicl
from .info import info
from .insert import insert
from .inspect import inspect
from .sweep import sweep
from .vicl import vicl

app = typer.Typer(
    name="flashbrush",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Segment-controlled attention for in-context image editing.",
)
# In the order in which --help lists them; the root's __main__ adds `bench`.
for _command in (insert, edit, inspect, vicl, sweep, demo, info):
    app.command()(_command)

eval_app = typer.Typer(
    name="eval", help="Judge a method over a folder of items.", pretty_exceptions_enable=False
)
eval_app.command("vicl")(eval_vicl)
eval_app.command("insert")(eval_insert)
app.add_typer(eval_app)


@eval_app.callback()
def _group() -> None:
    """Judge a method over a folder of items."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: of the command; None: the process's.

    Raises:
        SystemExit: always, with the exit code: 0; 2 for wrong input, with one line on standard error; 130
            when interrupted.
        Exception: an error that is not the user's.
    """
    command = typer.main.get_command(app)
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            code = command.main(given, "flashbrush", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if (message := _explain(error)) is None:
            raise
        # Errors of other libraries can be pages long.
        line = textwrap.shorten(message, 500, placeholder=" ...") or type(error).__name__
        print(f"flashbrush: {line}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(usual: Callable[..., None], message: Warning | str, *place: Any) -> None:
    """Print our warnings in one line, without the line of code."""
    if str(message).startswith("flashbrush: "):
        print(message, file=sys.stderr)
    else:
        usual(message, *place)


def _explain(error: Exception) -> str | None:
    """The message of an error that wrong input or the machine causes; None for any other error."""
    if hasattr(error, "format_message"):  # the command line's own errors
        return error.format_message()  # type: ignore[attr-defined]
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory is full: try --offload, or a smaller --width and --height"
    expected = (ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError)
    return str(error) if isinstance(error, expected) else None

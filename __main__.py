"""`flashbrush` and `python -m flashbrush`: the command line, with the benchmarks' `bench` added to it."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from .integrations.cli import main as command_line


@command_line.app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measure attention on this machine's CPU, ours beside others'; --help lists the options."""
    from .benchmarks.cpu.table import main as run

    raise typer.Exit(run(context.args))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: of the command; None: the process's.

    Raises:
        SystemExit: always, with the exit code.
    """
    command_line.main(arguments)


if __name__ == "__main__":
    main()

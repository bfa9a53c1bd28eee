"""`python -m clbench.leaderboard [results_dir] [--pack]`: the CSVs and the table, from the records of all runs."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from clbench.record.runs import pack
from clbench.report.tables import refresh
from clbench.types import NotWritten, UserMistake


def run_command(parser: ArgumentParser, action: Callable[[Namespace], int | None]) -> int:
    """Runs `action` with what the command line says, results_dir included; the exit code is its own, 2 for a user's mistake, 1 for a full disk."""
    parser.add_argument("results_dir", nargs="?", type=Path, default=Path("results"), help="holds the runs (results)")
    try:
        return action(parser.parse_args()) or 0
    except UserMistake as mistake:
        print(mistake, file=sys.stderr)
        return 2
    except NotWritten as failure:
        print(failure, file=sys.stderr)
        return 1


def _refresh_and_print(options: Namespace) -> None:
    """The files, then the table and where it is on standard output; what is no terminal gets the table in full width."""
    if options.pack:
        pack(options.results_dir)
    table, path = refresh(options.results_dir), options.results_dir / "leaderboard.csv"
    if table.row_count:
        Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
        print(path)
    else:
        print(table.caption, "Wrote the headers of", path)


if __name__ == "__main__":
    parser = ArgumentParser("python -m clbench.leaderboard", description="The records of all runs to CSV files.")
    parser.add_argument("--pack", action="store_true", help="first write the records to runs.tar.xz")
    sys.exit(run_command(parser, _refresh_and_print))

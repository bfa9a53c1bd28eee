"""`python -m clbench.leaderboard [results_dir]`: the CSVs and the table, from the records of all runs.

Not here: how a number is worked out (report).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.report.tables import refresh
from clbench.types import UserMistake

if TYPE_CHECKING:
    from rich.table import Table


def run_command(prog: str, *, about: str, action: Callable[[Path], None]) -> int:
    """Runs `action` on the results directory that the command line names; the exit code is 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument(
        "results_dir", nargs="?", type=Path, default=Path("results"), help="holds runs/ (default: results)"
    )
    try:
        action(parser.parse_args().results_dir)
    except UserMistake as mistake:
        print(mistake, file=sys.stderr)
        return 2
    return 0


def _refresh_and_print(results_dir: Path) -> None:
    """The files, then the table and where it is on standard output."""
    shown = refresh(results_dir)
    path = results_dir / "leaderboard.csv"
    if not any((results_dir / "runs").glob("*/")):
        print(f"No runs under {results_dir / 'runs'} yet: wrote the headers of {path}.")
        return
    _print(shown)
    print(path)


def _print(shown: Table) -> None:
    """The table on standard output; what is no terminal gets it in full width."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, width=width).print(shown)


if __name__ == "__main__":
    sys.exit(
        run_command("python -m clbench.leaderboard", about="Run directories to CSV files.", action=_refresh_and_print)
    )

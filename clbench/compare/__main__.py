"""`python -m clbench.compare RUN RUN`: a table of how two runs differ."""

import sys
from argparse import ArgumentParser
from itertools import groupby
from math import isnan
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from clbench.cli import FAILURES, refuse
from clbench.compare import Row, Side, compare, read_side
from clbench.types import UserMistake

NOTE = "Differences are first less second; 95 % intervals over the same questions of both (seeds and orders: differences.csv)."


def table(first: Side, second: Side) -> Table:
    """The rows by probe, within 80 columns."""
    rows = compare(first, second)
    if not rows:
        raise UserMistake(
            f"{first.name} and {second.name} have measured nothing in common; name two runs of one stream or probe"
        )
    names = [
        f"{place}: {side.name}, after stage {side.stage}" for place, side in (("first", first), ("second", second))
    ]
    right = ("first", "second", "difference", "interval", "items")
    found = Table(
        Column("task", overflow="fold"),
        "metric",
        *(Column(name, justify="right", no_wrap=True) for name in right),
        box=None,
    )
    found.title, found.caption = Text("\n".join(names)), Text(NOTE)
    found.title_justify = found.caption_justify = "left"
    for probe, own in groupby(rows, key=lambda row: row.key[0]):
        found.add_row(Text(probe, style="italic"))
        for row in own:
            found.add_row(*map(Text, cells(row)))
    return found


def cells(row: Row) -> list[str]:
    """One row as text."""
    _, task, metric = row.key
    interval = "-" if isnan(row.low) else f"{row.low:+.3f} to {row.high:+.3f}"
    numbers = f"{row.first:.3f}", f"{row.second:.3f}", f"{row.first - row.second:+.3f}"
    return [task, metric, *numbers, interval, f"{row.n_items or '-'}"]


if __name__ == "__main__":
    parser = ArgumentParser("python -m clbench.compare", description="How two runs differ by probe and task.")
    parser.add_argument("first", type=Path, help="results_dir/runs/NAME, or NAME@VIEW")
    parser.add_argument("second", type=Path, help="the same of the other, of any results_dir")
    options = parser.parse_args()
    try:
        both = table(read_side(options.first), read_side(options.second))
    except FAILURES as error:
        refuse(error)
    Console(highlight=False, width=None if sys.stdout.isatty() else 80).print(both)

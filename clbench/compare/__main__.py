"""`python -m clbench.compare RUN RUN`: tables of how two runs differ."""

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import groupby
from math import isnan
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from clbench.commands import side_command
from clbench.compare import Row, Side, compare, read_side
from clbench.types import UserMistake

NOTE = "First less second, with 95 % intervals over the questions that both answered; for seeds and orders see differences.csv."
COLUMNS = {"task": 20, "metric": 13, "first": 6, "second": 6, "difference": 23, "items": 5}
"""Headings and widths, in characters: 78 with the spaces between."""


def page(first: Side, second: Side) -> Iterator[Text | Table]:
    """What is printed, within 80 columns: a table for each probe."""
    rows = compare(first, second)
    if not rows:
        raise UserMistake(
            f"{first.name} and {second.name} have measured nothing in common; name two runs of one stream or probe"
        )
    for place, side in (("first", first), ("second", second)):
        yield Text(f"{place}: {side.name}, after stage {side.stage}")
    for probe, own in groupby(rows, key=lambda row: row.key[0]):
        table = Table(
            *(
                Column(name, width=width, overflow="fold", justify="left" if name in ("task", "metric") else "right")
                for name, width in COLUMNS.items()
            ),
            title=Text(f"\n{probe}"),
            title_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
        )
        for row in own:
            table.add_row(*map(Text, cells(row)))
        yield table
    yield Text(f"\n{NOTE}")


def cells(row: Row) -> list[str]:
    """One row as text."""
    _, task, metric = row.key
    interval = "" if isnan(row.low) else f" ({row.low:+.3f}, {row.high:+.3f})"
    values = f"{row.first:.3f}", f"{row.second:.3f}", f"{row.first - row.second:+.3f}{interval}"
    return [task, metric, *values, f"{row.n_items or '-'}"]


if __name__ == "__main__":
    parser = ArgumentParser("python -m clbench.compare", description="How two runs differ by probe and task.")
    parser.add_argument("first", type=Path, help="results_dir/runs/NAME, or NAME@VIEW")
    parser.add_argument("second", type=Path, help="the same of the other, of any results_dir")
    parts = side_command(parser, lambda options: list(page(read_side(options.first), read_side(options.second))))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 80)
    for part in parts:
        console.print(part)

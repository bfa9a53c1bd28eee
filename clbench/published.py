"""The papers' numbers with ours beside them: `python -m clbench.published [results_dir] [--stream S] [--method M]`.

Reads published.csv (results_dir's own, else the one that comes with clbench) and the complete runs of results_dir. Ours
stands beside a published number of the same stream, method, task, stage and metric, whatever the model: a juxtaposition,
never a reproduction. Not here: how our numbers are worked out (statistics, metrics).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite, isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from clbench.metrics import interval
from clbench.runs import MATRIX_PROBE, Run, read_runs
from clbench.statistics import KNOWLEDGE_PROBE, MEASURES, PERPLEXITY_PROBE, Entry, entries
from clbench.types import UserMistake

if TYPE_CHECKING:
    from rich.table import Table

FILE = "published.csv"
STATUSES = ("primary", "transcribed", "unverified")
BASE, END = "base", "end"
# Secondary views of a method's weights are probes of their own and never compared.
PROBES = (MATRIX_PROBE, KNOWLEDGE_PROBE, PERPLEXITY_PROBE)
HEADING = """\
Published numbers, and beside them ours (mean over seeds, 95 % interval) of the same stream, method, task and metric.
Models, budgets, prompts and scoring differ: this is a juxtaposition, not a reproduction.
Rates are fractions of 1. primary: read in the paper or in its authors' logs; transcribed: through somebody else's copy;
unverified: could not be checked. base: before training; end: after the last stage.
"""
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number. `value`: a fraction of 1 where it is a rate, else as printed; norms and perplexities have no unit.

    `stream`, `method`, `task` and `metric` are our names where they mean the same, else the paper's words. `after` is the
    stage after which it was measured, `base` or `end`. `task` is empty where the number is of the whole stream.
    """

    paper: str
    arxiv: str
    source: str
    stream: str
    model: str
    method: str
    setting: str
    task: str
    after: str
    metric: str
    value: float
    status: str
    note: str


COLUMNS = tuple(field.name for field in fields(Published))


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What one row of our leaderboard has for a published number, in its unit; bounds are NaN for one seed.

    `name` is our model, with the variant where the method has several, and the hash of the stream's data.
    """

    name: str
    n_seeds: int
    mean: float
    low: float
    high: float


def find_published(results_dir: Path) -> Path:
    """The file of published numbers: in `results_dir`, else in the project's results/, else in the installed package."""
    places = (results_dir, _HERE.parent / "results", _HERE)
    for place in places:
        if (place / FILE).is_file():
            return place / FILE
    raise UserMistake(
        f"{FILE} is in none of {', '.join(map(str, places))}; copy the project's results/{FILE} to results_dir"
    )


def read_published(path: Path) -> tuple[Published, ...]:
    """The rows of a published.csv, in file order; raises UserMistake with the line of one that is not as COLUMNS says."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserMistake(f"{path} has the columns {reader.fieldnames}; it must have {', '.join(COLUMNS)}")
        return tuple(_row(cells, place=f"{path}, line {reader.line_num}") for cells in reader)


def beside(row: Published, ranked: Sequence[Entry]) -> tuple[Ours, ...]:
    """Ours of the same stream, method, task, stage and metric: one for each model and variant that measured it."""
    same = [entry for entry in ranked if (entry.setting[0], entry.method) == (row.stream, row.method)]
    found = [(entry, *_bounds(row, entry)) for entry in same if is_whole(entry)]
    return tuple(
        Ours(name=_name(entry), n_seeds=entry.n_seeds, mean=mean, low=low, high=high)
        for entry, mean, low, high in found
        if not isnan(mean)
    )


def is_whole(entry: Entry) -> bool:
    """Whether its runs trained all the tasks of their stream, in the stream's own order: only then is it the published one."""
    streams = [(run.manifest["tasks"], run.manifest["config"].get("stream", {}).get("tasks")) for run in entry.runs]
    return all(trained == named for trained, named in streams)


def tables(rows: Sequence[Published], ranked: Sequence[Entry]) -> Iterator[Table]:
    """One table per source, status, model and stream, its notes numbered below it."""
    groups: dict[tuple[str, ...], list[Published]] = {}
    for row in rows:
        key = (row.paper, row.arxiv, row.source, row.status, row.model, row.stream)
        groups.setdefault(key, []).append(row)
    for (paper, arxiv, source, status, model, stream), members in groups.items():
        cited = f"{paper} (arXiv {arxiv})" if arxiv else paper
        yield _table(f"{cited}, {source}, {status}; model {model}; stream {stream}", members, ranked)


def main(arguments: Sequence[str]) -> int:
    """Prints the published rows that were asked for; 0, or 2 for a mistake of the user's."""
    parser = _Parser(prog="python -m clbench.published", description="The papers' numbers, with ours beside them.")
    parser.add_argument(
        "results_dir", nargs="?", type=Path, default=Path("results"), help="holds runs/ (default: results)"
    )
    parser.add_argument("--stream", help="only the rows of this stream")
    parser.add_argument("--method", help="only the rows of this method")
    try:
        options = parser.parse_args(arguments)
        path = find_published(options.results_dir)
        rows = _chosen(path, stream=options.stream, method=options.method)
        _show(rows, entries(read_runs(options.results_dir)), path)
    except UserMistake as mistake:
        print(f"clbench: {mistake}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserMistake(f"{message}; see {self.prog} --help")


def _row(cells: dict[str, str], *, place: str) -> Published:
    """One line of the file, checked."""
    if None in cells or None in cells.values():
        raise UserMistake(f"{place} must have {len(COLUMNS)} cells")
    if cells["status"] not in STATUSES:
        raise UserMistake(f"{place} has status {cells['status']!r}; choose one of {', '.join(STATUSES)}")
    try:
        value = float(cells["value"])
    except ValueError:
        value = nan
    if not isfinite(value):
        raise UserMistake(f"{place} has value {cells['value']!r}; give a number")
    return Published(**{**cells, "value": value})


def _chosen(path: Path, *, stream: str | None, method: str | None) -> list[Published]:
    """The rows of the file that were asked for."""
    rows = read_published(path)
    streams, methods = {row.stream for row in rows}, {row.method for row in rows}
    for option, wanted, known in (("stream", stream, streams), ("method", method, methods)):
        if wanted is not None and wanted not in known:
            raise UserMistake(f"--{option} {wanted!r} is in no row of {path}; choose one of {', '.join(sorted(known))}")
    chosen = [row for row in rows if stream in (None, row.stream) and method in (None, row.method)]
    if not chosen:
        raise UserMistake(f"no row of {path} has both stream {stream!r} and method {method!r}; leave one of them out")
    return chosen


def _bounds(row: Published, entry: Entry) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval of what `row` states, in its unit; NaN where the entry did not measure it."""
    if row.task:
        by_seed: dict[int, list[float]] = {}
        for run in entry.runs:
            by_seed.setdefault(run.seed, []).append(_score(row, run))
        # As in the leaderboard: a seed that was run twice is one replicate.
        return interval([sum(values) / len(values) for values in by_seed.values()])
    if row.metric not in MEASURES or row.after != END:
        return nan, nan, nan
    mean, low, high = (asdict(part)[row.metric] for part in (entry.mean, entry.low, entry.high))
    return mean, low, high


def _score(row: Published, run: Run) -> float:
    """The run's score of the row's task, stage and metric, in its unit; NaN where it was not measured."""
    stages = {BASE: 0, END: run.last_stage} | {name: stage for stage, name in run.stage_names.items() if stage}
    keys = [(stages.get(row.after, -1), probe, row.task, row.metric) for probe in PROBES]
    return next((run.values[key] for key in keys if key in run.values), nan)


def _name(entry: Entry) -> str:
    """The model, with the variant where the method has several, and the hash of the data."""
    _, _, model, data = entry.setting
    return f"{model}{entry.label.removeprefix(entry.method)}{', data ' if data else ''}{data}"


def _table(title: str, rows: Sequence[Published], ranked: Sequence[Entry]) -> Table:
    """The rows of one source."""
    from rich.table import Table
    from rich.text import Text

    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    caption = Text("\n".join(f"{number} {note}" for number, note in enumerate(notes, 1)))
    shown = Table(title=Text(title), caption=caption, title_justify="left", caption_justify="left", box=None)
    for heading in ("method", "setting", "task", "after", "metric"):
        shown.add_column(heading, overflow="fold")
    for heading in ("published", "note", "ours", "seeds"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("our model", no_wrap=True)
    for row in rows:
        number = str(notes.index(row.note) + 1) if row.note else ""
        found = beside(row, ranked)
        ours = ["\n".join(cells) for cells in zip(*map(_ours_cells, found), strict=True)] if found else ["-", "", ""]
        measured = (row.method, row.setting, row.task, row.after, row.metric)
        shown.add_row(*map(Text, (*measured, f"{row.value:.10g}", number, *ours)))
    return shown


def _ours_cells(ours: Ours) -> tuple[str, str, str]:
    """Mean with its interval, seeds, model."""
    spread = "" if isnan(ours.low) else f" [{ours.low:.3f}, {ours.high:.3f}]"
    return f"{ours.mean:.3f}{spread}", str(ours.n_seeds), ours.name


def _show(rows: Sequence[Published], ranked: Sequence[Entry], path: Path) -> None:
    """Heading, tables, and what was counted and left out, on standard output; what is no terminal gets full width."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 180)
    console.print(HEADING)
    for shown in tables(rows, ranked):
        console.print(shown)
        console.print()
    streams = {row.stream for row in rows}
    partial = [entry for entry in ranked if entry.setting[0] in streams and not is_whole(entry)]
    for entry in partial:
        stream, order = entry.setting[:2]
        console.print(
            f"Left out, as of other tasks or in another order: {stream}, {order}, {entry.method}, {_name(entry)}."
        )
    matched = sum(bool(beside(row, ranked)) for row in rows)
    console.print(f"{len(rows)} published numbers of {path}; ours stands beside {matched}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

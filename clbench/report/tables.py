"""The leaderboard: run directories to CSV files and tables that need no help to read.

Equal ledgers give equal bytes. Not here: how a number is worked out (statistics, metrics).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, fields
from io import StringIO
from itertools import groupby
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.record.runs import STATES, Run, read_runs
from clbench.report.summary import MEASURES, Entry, StageRetention, entries, stage_retention, tied_with_best
from clbench.types import UserMistake

if TYPE_CHECKING:
    from rich.table import Table

RUN_COLUMNS = ("stream", "order", "model", "method", "seed")
STAGE_COLUMNS = (*RUN_COLUMNS, "stage", "stage_name", "probe", "task", "metric", "value", "n", "stderr", "run")
RETENTION_COLUMNS = (
    *(*RUN_COLUMNS, "stage", "stage_name"),
    *(field.name for field in fields(StageRetention)),
    *("stream_hash", "run"),
)
ENTRY_COLUMNS = (
    *("stream", "order", "model", "method", "variant", "n_seeds"),
    *(f"{name}{bound}" for name in MEASURES for bound in ("", "_low", "_high")),
    *("stream_hash", "notes"),
)
# What a person reads first: heading, measure, format.
KEY_COLUMNS = (
    ("accuracy", "average_accuracy", ".3f"),
    ("learned", "learning_accuracy", ".3f"),
    ("BWT", "bwt", "+.3f"),
    ("forgetting", "forgetting", ".3f"),
    ("retention", "retention", ".3f"),
    ("worst probe", "retention_min", ".3f"),
    ("perplexity", "perplexity_ratio", ".2f"),
    ("valid form", "format_validity", ".3f"),
    ("train s", "seconds_train", ".0f"),
    ("parameters", "trainable_parameters", ",.0f"),
)
MARKED = ("average_accuracy", "retention")
ON_TERMINAL = (*MARKED, "bwt", "perplexity_ratio", "seconds_train")
LEGEND = """\
Mean ± half of the 95 % Student-t interval over seeds. **Bold** is the best of those that train; ≈ marks those whose
interval overlaps the best's, or that cannot be told apart because a method has one seed.
Accuracy: mean score over all tasks after the last stage. Learned: mean score right after a task's own stage. BWT and
forgetting: change since a task's own stage, drop from its best score. Retention: share of the untouched model's
above-chance accuracy on base knowledge that is left (ratio of sums over probes); worst probe: the lowest one.
Perplexity: ratio to the untouched model, on text that it knew. All columns: leaderboard.csv. Stages: retention.csv,
stages.csv.
"""


def refresh(results_dir: Path) -> Table:
    """Writes stages.csv, retention.csv, leaderboard.csv and leaderboard.md from the runs under `results_dir`; gives the table to print."""
    runs = read_runs(results_dir)
    readable = [run for run in runs if run.state != "unreadable"]
    rows = entries(readable)
    contents = {
        "stages.csv": _csv(STAGE_COLUMNS, sorted(_stage_rows(readable), key=_stage_order)),
        "retention.csv": _csv(RETENTION_COLUMNS, _retention_rows(readable)),
        "leaderboard.csv": _csv(ENTRY_COLUMNS, map(_entry_row, rows)),
        "leaderboard.md": _markdown(rows, runs=runs),
    }
    for name, text in contents.items():
        replace_file(results_dir / name, text)
    return table(rows, runs=runs)


def table(ranked: Sequence[Entry], *, runs: Sequence[Run]) -> Table:
    """The leaderboard for a terminal, one section per stream, order and model."""
    from rich.table import Table
    from rich.text import Text

    settings = sorted({entry.setting for entry in ranked})
    title = (
        "Leaderboard"
        if len(settings) != 1
        else "Leaderboard of stream {}, order {}, model {}, data {}".format(*settings[0])
    )
    notes = [f"{entry.label}: {'; '.join(entry.notes)}" for entry in ranked if entry.notes]
    caption = Text("\n".join([*notes, unranked(runs)]))
    shown = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=None)
    columns = [column for column in KEY_COLUMNS if column[1] in ON_TERMINAL]
    shown.add_column("method", overflow="fold")
    for heading in ("seeds", *(heading for heading, _, _ in columns)):
        shown.add_column(heading, justify="right", no_wrap=True)
    for setting, group in groupby(ranked, key=lambda entry: entry.setting):
        rows = tuple(group)
        marks = {measure: tied_with_best(rows, measure=measure) for measure in MARKED}
        if len(settings) > 1:
            shown.add_row("stream {}, order {}, model {}, data {}".format(*setting), style="italic")
        for entry in rows:
            cells = [cell_text(entry, name, form, marks, spread=name in MARKED) for _, name, form in columns]
            bold = [f"[bold]{cell.strip('*')}[/bold]" if cell.startswith("**") else cell for cell in cells]
            shown.add_row(Text(entry.label), str(entry.n_seeds), *bold)
        shown.add_section()
    return shown


def unranked(runs: Sequence[Run]) -> str:
    """One line: how many runs are not ranked, in which states, and which they are."""
    if all(run.state == "complete" and not run.unfit for run in runs):
        return f"All {len(runs)} runs are complete." if runs else "There are no runs yet."
    parts = []
    for state in STATES[1:]:
        members = [f"{run.name} ({run.problem})" if run.problem else run.name for run in runs if run.state == state]
        if members:
            parts.append(f"{len(members)} {state}: {', '.join(members)}")
    parts += [f"{run.name}: {run.unfit}" for run in runs if run.state == "complete" and run.unfit]
    count = sum(run.state != "complete" or bool(run.unfit) for run in runs)
    return f"{count} of {len(runs)} runs are not ranked; {'; '.join(parts)}."


def _run_cells(run: Run) -> tuple[str | int, ...]:
    """What names a run, in the order of RUN_COLUMNS."""
    return (*run.setting[:3], run.method, run.seed)


def _stage_rows(runs: Iterable[Run]) -> Iterator[tuple[str | int | float, ...]]:
    """Every score of every run, as STAGE_COLUMNS; times are left out, so that a repeated run gives the same bytes."""
    for run in runs:
        for s in run.scores:
            cells = (s.stage, s.stage_name, s.probe, s.task, s.metric, float(s.value), s.n, float(s.stderr))
            yield (*_run_cells(run), *cells, run.name)


def _stage_order(row: tuple[str | int | float, ...]) -> tuple[str | int | float, ...]:
    """Sort key of stages.csv: the columns that name a row, never a measured value."""
    named = {"value", "n", "stderr"}
    return tuple(cell for column, cell in zip(STAGE_COLUMNS, row, strict=True) if column not in named)


def _retention_rows(runs: Iterable[Run]) -> Iterator[tuple[str | int | float, ...]]:
    """One row per run and stage, as RETENTION_COLUMNS."""
    for run in sorted(runs, key=lambda run: (*_run_cells(run), run.name)):
        for stage, name in sorted(run.stage_names.items()):
            kept = astuple(stage_retention(run, stage=stage))
            yield (*_run_cells(run), stage, name, *kept, run.setting[3], run.name)


def _entry_row(entry: Entry) -> tuple[str | int | float, ...]:
    """One row of leaderboard.csv, as ENTRY_COLUMNS."""
    numbers = (vars(part)[name] for name in MEASURES for part in (entry.mean, entry.low, entry.high))
    named = (*entry.setting[:3], entry.method, entry.variant, entry.n_seeds)
    return (*named, *map(float, numbers), entry.setting[3], "; ".join(entry.notes))


def _csv(columns: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> str:
    """CSV text: floats as the shortest text that reads back equal, NaN as an empty cell."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        assert len(row) == len(columns), (len(row), len(columns))
        writer.writerow(["" if cell != cell else repr(cell) if isinstance(cell, float) else cell for cell in row])
    return text.getvalue()


def _markdown(rows: Sequence[Entry], *, runs: Sequence[Run]) -> str:
    """leaderboard.md: one table per stream, order and model."""
    lines = ["# Leaderboard", "", unranked(runs), ""]
    for (stream, order, model, data), group in groupby(rows, key=lambda entry: entry.setting):
        members = tuple(group)
        marks = {measure: tied_with_best(members, measure=measure) for measure in MARKED}
        headings = ["method", "seeds", *(heading for heading, _, _ in KEY_COLUMNS), "notes"]
        lines += [f"## stream {stream}, order {order}, model {model}, data {data}", "", references(members[0]), ""]
        lines += [_md_row(headings), _md_row(["---"] + ["---:"] * (len(headings) - 2) + ["---"])]
        for entry in members:
            cells = [cell_text(entry, name, form, marks) for _, name, form in KEY_COLUMNS]
            lines.append(_md_row([entry.label, str(entry.n_seeds), *cells, "; ".join(entry.notes)]))
        lines.append("")
    return "\n".join(lines) + "\n" + LEGEND


def references(entry: Entry) -> str:
    """What average accuracy is worth: that of the untouched model, of chance and of the most frequent answer."""
    mean = entry.mean
    named = (
        ("the untouched model", mean.base_accuracy),
        ("chance", mean.chance_accuracy),
        ("the majority class", mean.majority_accuracy),
        ("answers that have only the form", mean.format_only_accuracy),
    )
    return (
        "Average accuracy of " + ", ".join(f"{name} {'unknown' if isnan(v) else f'{v:.3f}'}" for name, v in named) + "."
    )


def _md_row(cells: Sequence[str]) -> str:
    """One row of a markdown table."""
    return f"| {' | '.join(cells)} |"


def cell_text(
    entry: Entry,
    measure: str,
    form: str,
    marks: Mapping[str, tuple[str | None, frozenset[str]]],
    *,
    spread: bool = True,
) -> str:
    """Mean of a measure, ± half its interval if `spread`, with its mark, as markdown."""
    mean, half = vars(entry.mean)[measure], vars(entry.high)[measure] - vars(entry.mean)[measure]
    if isnan(mean):
        return "-"
    text = f"{mean:{form}}"
    if spread and half > 0:
        text += f" ± {half:{form.lstrip('+')}}"
    best, tied = marks.get(measure, (None, frozenset()))
    return f"**{text}**" if entry.label == best else f"{text} ≈" if entry.label in tied else text


def replace_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all; the temporary name is this process's own, as runs end side by side."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        temporary.replace(path)
    except OSError as error:
        raise UserMistake(
            f"{path} cannot be written ({error.strerror}); give a results_dir that you may write to"
        ) from error

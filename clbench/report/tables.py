"""The leaderboard: CSV files and tables that need no help to read. Equal ledgers give equal bytes."""

import json
import re
from collections.abc import Iterator
from math import isnan
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype
from rich.table import Column, Table
from rich.text import Text

from clbench.record.runs import read_runs, remove_left, replace_file
from clbench.report.columns import columns_of, legend
from clbench.report.measures import RANKED, SETTING
from clbench.report.search import search
from clbench.report.summary import NAMED, Summary, marks, summarise

STAGE_KEYS = [*NAMED, "seed", "stage", "stage_name", "probe", "task", "metric"]
# What a person reads first: heading, measure, format.
KEY_COLUMNS = (
    ("accuracy", "average_accuracy", ".3f"),
    ("learned", "learning_accuracy", ".3f"),
    ("BWT", "bwt", "+.3f"),
    ("forgetting", "forgetting", ".3f"),
    ("retention", "retention", ".3f"),
    ("probability kept", "retention_probability", ".3f"),
    ("worst probe", "retention_min", ".3f"),
    ("perplexity", "perplexity_ratio", ".2f"),
    ("valid form", "format_validity", ".3f"),
    ("train s", "seconds_train", ".0f"),
    ("parameters", "trainable_parameters", ",.0f"),
)
FORMULAS = ("=", "+", "-", "@", "\t", "\r")
ON_TERMINAL = ["method", "blocks", "accuracy", "BWT", "retention", "perplexity"]
"""They fit 80 characters with their intervals."""
SAID = {
    "average_accuracy": "average accuracy",
    "retention_probability": "the probability kept of base knowledge",
    "log_perplexity_ratio": "perplexity",
}
"""The measures of differences.csv that are spoken of, and how they read."""
REFERENCES = (
    "Average accuracy of the untouched model {base_accuracy:.3f}, chance {chance_accuracy:.3f}, "
    "the majority class {majority_accuracy:.3f}, answers that have only the form {format_only_accuracy:.3f}, "
    "words copied from the prompt {copy_accuracy:.3f}."
)
LEGEND = f"""\
Mean ± half of the 95 % Student-t interval over blocks (orders, seeds). **Bold** is the best of those that train; ≈ marks those that may be the
best, too: none is separated from them as better (differences.csv).

{legend({heading: column for heading, column, _ in KEY_COLUMNS})}

All columns: leaderboard.csv. What they mean: results/COLUMNS.md.
"""


def refresh(results_dir: Path) -> Table:
    """Writes every table from the runs of `results_dir`: the FILES of columns, leaderboard.json and leaderboard.md; gives the table to print."""
    summary = summarise(read_runs(results_dir))
    remove_left(results_dir)
    for name, content in generated(summary).items():
        replace_file(results_dir / name, content)
    return _terminal(summary)


def generated(summary: Summary) -> dict[str, bytes]:
    """The content of every table by the name of its file."""
    tables = {
        # Times are left out, so that a repeated run gives the same bytes.
        "stages.csv": summary.records.scores.merge(summary.records.runs, on="run").sort_values([*STAGE_KEYS, "run"]),
        "retention.csv": summary.retention,
        "probes.csv": summary.probes,
        "differences.csv": summary.differences,
        "search.csv": search(summary),
        "leaderboard.csv": summary.listed,
    }
    tables = {name: table[columns_of(name)] for name, table in tables.items()}
    files = {name: inert(table).to_csv(index=False, lineterminator="\n").encode() for name, table in tables.items()}
    # By rows, so that counts stay whole numbers; what does not exist is null.
    board = tables["leaderboard.csv"].to_dict("records")
    objects = [{name: None if pd.isna(value) else value for name, value in row.items()} for row in board]
    files["leaderboard.json"] = (json.dumps(objects, indent=1) + "\n").encode()
    files["leaderboard.md"] = _markdown(summary).encode()
    return files


def inert(table: pd.DataFrame) -> pd.DataFrame:
    """The table with an apostrophe before text that a spreadsheet would take for a formula."""
    texts = {name: column for name, column in table.items() if not is_numeric_dtype(column)}
    safe = {
        name: [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULAS) else cell for cell in column]
        for name, column in texts.items()
    }
    # As objects: a column of counts and gaps would else become one of fractions.
    return table.assign(**{name: pd.Series(cells, index=table.index, dtype=object) for name, cells in safe.items()})


def plain(text: str) -> str:
    """Text that stands in a page of Markdown: no tag begins in it, no cell of a table ends."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text).replace("|", "\\|")


def unranked(runs: pd.DataFrame) -> str:
    """One line: how many runs are not ranked, in which states, and which they are."""
    runs = runs[~runs["run"].str.contains("@")]  # views of a run's weights are no runs
    left = runs[(runs["state"] != "complete") | (runs["problem"] != "")]
    if left.empty:
        return f"All {len(runs)} runs are complete." if len(runs) else "There are no runs yet."
    unfit, others = left[left["state"] == "complete"], left[left["state"] != "complete"]
    names = others["run"] + others["problem"].map(lambda why: f" ({why})" if why else "")
    parts = [f"{len(own)} {state}: {', '.join(own)}" for state, own in names.groupby(others["state"])]
    parts += list(unfit["run"] + ": " + unfit["problem"])
    return f"{len(left)} of {len(runs)} runs are not ranked; {'; '.join(parts)}."


def settings(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of the leaderboard by what they are compared on, and how that reads."""
    return [("stream {}, model {}, data {}".format(*setting), own) for setting, own in rows.groupby(SETTING)]


def references(rows: pd.DataFrame) -> str:
    """What average accuracy is worth: that of the untouched model and of answers that know nothing."""
    return REFERENCES.format(**rows.iloc[0]).replace("nan", "unknown")


def readable(rows: pd.DataFrame, *, spread: bool) -> pd.DataFrame:
    """The rows of one setting as text: means, ± half their interval (of the RANKED measures only unless `spread`), marks, notes."""
    counts = [f"{row.n_blocks} ({row.n_orders}, {row.n_seeds})" for row in rows.itertuples()]
    shown = pd.DataFrame({"method": rows["label"], "blocks": counts})
    for heading, measure, form in KEY_COLUMNS:
        mark, cells = marks(rows, measure) if measure in RANKED else {}, []
        for label, mean, high in rows[["label", measure, f"{measure}_high"]].itertuples(index=False):
            text = "-" if isnan(mean) else f"{mean:{form}}"
            if high > mean and (spread or measure in RANKED):
                text += f" ± {high - mean:{form.lstrip('+')}}"
            cells.append({"best": f"**{text}**", "tied": f"{text} ≈"}.get(mark.get(label, ""), text))
        shown[heading] = cells
    return shown.assign(notes=rows["notes"])


LISTED = 12
"""Most rows that a finding names; of more it gives the number."""


def findings(differences: pd.DataFrame, rows: pd.DataFrame) -> Iterator[str]:
    """A sentence for each measure of SAID: the rows that are better than the most others, and of how many pairs one can be told from the other.

    `rows`: rows of the leaderboard that share a setting. `differences`: pairs of rows, these among them. Nothing is said of pairs without a test.
    """
    labels = {(row.method, row.variant): row.label for row in rows.itertuples()}
    setting = rows.iloc[0][SETTING]
    pairs = differences[(differences[setting.index] == setting).all(axis=1) & differences["q"].notna()]
    for measure, name in SAID.items():
        own = pairs[pairs["measure"] == measure]
        if own.empty:
            continue
        beaten: dict[str, list[str]] = {}
        for row in own[own["verdict"].isin(["better", "worse"])].itertuples():
            left, right = labels[row.method, row.variant], labels[row.other, row.other_variant]
            winner, loser = (left, right) if row.verdict == "better" else (right, left)
            beaten.setdefault(winner, []).append(loser)
        if not beaten:
            yield f"In {name} none of {len(own)} pairs can be told apart."
            continue
        most = max(map(len, beaten.values()))
        sides = (["method", "variant"], ["other", "other_variant"])
        others = len({row for side in sides for row in own[side].itertuples(index=False, name=None)}) - 1
        best = [
            f"{winner} is better than {in_words(losers) if most <= LISTED else f'{most} of {others} others'}"
            for winner, losers in beaten.items()
            if len(losers) == most
        ]
        yield f"In {name} {'; '.join(best)}; {sum(map(len, beaten.values()))} of {len(own)} pairs can be told apart."


def in_words(names: list[str]) -> str:
    """
    >>> in_words(["a"]), in_words(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def _markdown(summary: Summary) -> str:
    lines = ["# Leaderboard", "", plain(unranked(summary.records.runs)), ""]
    for setting, own in settings(summary.listed):
        shown = readable(own, spread=True)
        rule = ["---", *["---:"] * (shown.shape[1] - 2), "---"]
        lines += [f"## {plain(setting)}", "", references(own), ""]
        cells = shown.map(plain)
        lines += [f"| {' | '.join(row)} |" for row in (shown.columns, rule, *cells.to_numpy())]
        found = [f"- {plain(sentence)}" for sentence in findings(summary.differences, own)]
        lines += ["", *found, ""] if found else [""]
    return "\n".join(lines) + "\n" + LEGEND


def _terminal(summary: Summary) -> Table:
    rows = summary.listed
    sections, notes = settings(rows), rows[rows["notes"] != ""]
    found = [sentence for _, own in sections for sentence in findings(summary.differences, own)]
    columns = [Column(heading, justify="right", no_wrap=True) for heading in ON_TERMINAL[1:]]
    table = Table(Column(ON_TERMINAL[0], overflow="fold"), *columns, box=None)
    table.title = f"Leaderboard of {sections[0][0]}" if len(sections) == 1 else "Leaderboard"
    table.caption = Text("\n".join([*found, *(notes["label"] + ": " + notes["notes"]), unranked(summary.records.runs)]))
    table.title_justify = table.caption_justify = "left"
    for setting, own in sections:
        if len(sections) > 1:
            table.add_row(setting, style="italic")
        for method, *cells in readable(own, spread=False)[ON_TERMINAL].to_numpy():
            table.add_row(Text(method), *(Text(cell.strip("*"), style="bold" if "*" in cell else "") for cell in cells))
        table.add_section()
    return table

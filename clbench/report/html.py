"""The report: one self-contained HTML file with tables, figures and where every number comes from.

`python -m clbench.report [results_dir]` writes report.html, which needs no network. Tables are in the page; report.js sorts them and draws the
figures. Equal runs give equal bytes. Not here: how a number is worked out (summary, metrics), what a figure shows (figures).
"""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import pandas as pd

from clbench.record.runs import read_runs, replace_file
from clbench.report.figures import as_script, of_setting
from clbench.report.measures import SETTING
from clbench.report.published import NOTE, as_text, beside
from clbench.report.summary import Summary, summarise
from clbench.report.tables import LEGEND, readable, references, settings, unranked

# Whatever a name in the page holds, nothing is loaded and nothing is sent.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
FIGURES = {
    "ranks": (
        "Ranks",
        "From the best to the worst rank that the differences allow, 1 the best; the point is the place of the mean. Fewer than six blocks leave "
        "all open.",
    ),
    "plane": (
        "Stability and plasticity",
        "A method that learns little forgets little: compare at equal learning. Ticked methods are named, with 95 % intervals over blocks. "
        "Lines: the same method at other learning rates, in the search's world, where it stands beside the runs (tuning/leaderboard.csv).",
    ),
    "stages": (
        "Over the stream",
        "Mean over runs; the band reaches from the lowest to the highest. Dotted: the untouched model, and chance.",
    ),
    "matrix": (
        "Score of every task after every stage",
        "Fractions of 1. Down: stages, the untouched model on top. Across: tasks in the order of the run. Framed: a task after its own stage.",
    ),
    "items": (
        "Base knowledge lost and gained",
        "Items that turned wrong (left) and right (right) after the last stage, beyond what guessing explains; mean over probes and blocks.",
    ),
    "verdicts": (
        "Who differs from whom",
        "The row against the column: + better, − worse, · not separated; empty: too few blocks to say. Point at a cell for its numbers.",
    ),
    "drift": ("Forgetting against distance", "How far the model's predictions moved from the untouched model's."),
    "cost": ("Cost against accuracy", "Dashed: the Pareto front. What lies below and right of it costs more for less."),
    "bands": (
        "Rare and common facts",
        "After the last stage; mean over runs, the band from lowest to highest. Facts that the untouched model barely knew have no retention.",
    ),
}
"""What report.js draws of each setting, in order: title and note."""


def write(results_dir: Path) -> Path:
    """Writes report.html from the runs of `results_dir` and returns its path."""
    path = results_dir / "report.html"
    replace_file(path, page(summarise(read_runs(results_dir)), results_dir).encode())
    return path


def page(summary: Summary, results_dir: Path) -> str:
    """The whole page; `results_dir` may hold the search for settings, too (tuning/leaderboard.csv)."""
    body = [f"<h1>What was learned, what was kept, what it cost</h1><p>{escape(unranked(summary.records.runs))}</p>"]
    compared = [(name, rows.set_index("label", drop=False)) for name, rows in settings(summary.leaderboard)]
    for name, rows in compared:
        body.append(f"<article><h2>{escape(name)}</h2>{''.join(_setting(summary, rows))}</article>")
    body.append(_card("Where the numbers come from", _provenance(summary.records.runs), kind="text"))
    figures = as_script(of_setting(summary, rows, results_dir / "tuning" / "leaderboard.csv") for _, rows in compared)
    return _document("".join(body), figures)


def _document(body: str, figures: str) -> str:
    css, js = (Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
    meta += f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    scripts = f'<script type="application/json" id="figures">{figures}</script><script>{js}</script>'
    head = f"<head>{meta}<title>clbench report</title><style>{css}</style></head>"
    return f'<!DOCTYPE html>\n<html lang="en">{head}<body><main>{body}</main>{scripts}</body></html>\n'


def _setting(summary: Summary, rows: pd.DataFrame) -> Iterator[str]:
    shown = summary.listed[(summary.listed[SETTING] == rows.iloc[0][SETTING]).all(axis=1)]
    board = f"<p>{references(rows)}</p>{_table(readable(shown, spread=False))}"
    yield _card("Leaderboard", board, note=LEGEND, kind="leaderboard")
    if len(published := beside(summary, rows)):
        yield _card("Published numbers", _table(as_text(published)), note=NOTE, kind="text")
    yield '<nav aria-label="methods"><noscript>The figures are drawn by a script in this file.</noscript></nav>'
    for name, (title, note) in FIGURES.items():
        yield _card(title, "", note=note, kind=f"figure {name}")


def _card(title: str, content: str, *, note: str = "", kind: str = "") -> str:
    """A titled box; `content` is HTML, `note` text."""
    return f'<section class="{kind}"><h3>{title}</h3>{content}<p class="note">{_strong(escape(note))}</p></section>'


def _strong(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _table(cells: pd.DataFrame) -> str:
    with pd.option_context("display.max_colwidth", None):
        return f'<div class="wide">{_strong(cells.to_html(index=False, border=0))}</div>'


def _provenance(runs: pd.DataFrame) -> str:
    """Every run, ranked or not: its state, commit, configuration and command."""
    told = runs.assign(commit=runs["commit"].str[:12], config=runs["config_hash"].str[:12])
    return _table(told[["run", "state", "problem", "commit", "dirty", "config", "variant", "command"]])

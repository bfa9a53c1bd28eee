"""The report: one self-contained HTML file with tables, plots and where every number comes from.

`python -m clbench.report [results_dir]` writes report.html, which needs no network and no script. Equal runs give equal
bytes. Not here: how a number is worked out (summary, metrics).
"""

import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from html import escape
from io import BytesIO
from math import nan
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clbench.record.runs import read_runs, replace_file
from clbench.report.measures import BLOCK
from clbench.report.metrics import accuracy_so_far
from clbench.report.published import NOTE, as_text, beside
from clbench.report.summary import Summary, summarise
from clbench.report.tables import LEGEND, readable, references, settings, unranked

# Okabe and Ito's palette, which colour-blind readers can tell apart; a second round is dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
FAINT = "#9aa5b1"
STYLE = {"svg.hashsalt": "clbench", "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
CURVES = {
    "accuracy": "Accuracy on the tasks so far",
    "retention": "Retention of base knowledge",
    "perplexity_ratio": "Perplexity ratio to the untouched model",
}
"""What is drawn over the stages, and its title."""


def write(results_dir: Path) -> Path:
    """Writes report.html from the runs of `results_dir` and returns its path."""
    summary, path = summarise(read_runs(results_dir)), results_dir / "report.html"
    body = [f"<h1>What was learned, what was kept, what it cost</h1><p>{escape(unranked(summary.records.runs))}</p>"]
    for setting, rows in settings(summary.leaderboard):
        body += [f"<h2>{escape(setting)}</h2>", *_setting(summary, rows.set_index("label", drop=False))]
    body.append(_card("Where the numbers come from", _provenance(summary.records.runs), kind="text"))
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><title>clbench report</title><style>{css}</style>'
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>\n'
    replace_file(path, page.encode())
    return path


def _setting(summary: Summary, rows: pd.DataFrame) -> Iterator[str]:
    yield _card("Leaderboard", f"<p>{references(rows)}</p>{_table(readable(rows, spread=False))}", note=LEGEND)
    if len(published := beside(summary, rows)):
        yield _card("Published numbers", _table(as_text(published)), note=NOTE, kind="text")
    note = "Mean over blocks; the band reaches from the lowest block to the highest. Dotted: the untouched model, and chance."
    yield _figure("Over the stream", lambda figure: _draw_curves(figure, summary, rows), height=3.6, note=note)
    note = "A method that learns little forgets little: compare methods at equal learning. Bars: 95 % over blocks."
    yield _figure("Learning against keeping", lambda figure: _draw_trade_off(figure, rows), height=3.8, note=note)
    note = "Down: stages, the untouched model on top. Across: tasks in the order of the run. One block a method, the first."
    height, draw = 2.9 * -(-len(rows) // 4) + 0.3, lambda figure: _draw_matrices(figure, summary, rows)
    yield _figure("Score of every task after every stage", draw, height=height, note=note)
    yield _figure("Cost", lambda figure: _draw_cost(figure, rows), height=0.9 + 0.34 * len(rows))


def _card(title: str, content: str, *, note: str = "", kind: str = "") -> str:
    """A titled box; `content` is HTML, `note` text."""
    return f'<section class="{kind}"><h3>{title}</h3>{content}<p class="note">{_strong(escape(note))}</p></section>'


def _strong(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _table(cells: pd.DataFrame) -> str:
    with pd.option_context("display.max_colwidth", None):
        return _strong(cells.to_html(index=False, border=0))


def _provenance(runs: pd.DataFrame) -> str:
    """Every run, ranked or not: its state, commit, configuration and command."""
    told = runs.assign(commit=runs["commit"].str[:12], config=runs["config_hash"].str[:12])
    return _table(told[["run", "state", "problem", "commit", "dirty", "config", "variant", "command"]])


def _figure(title: str, draw: Callable[[Figure], None], *, height: float, note: str = "") -> str:
    """A card with what `draw` puts on a figure of `height` inches, which carries its own data."""
    with matplotlib.rc_context(STYLE):
        figure, stream = Figure(figsize=(11, height), layout="constrained"), BytesIO()
        draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{b64encode(stream.getvalue()).decode()}"
    return _card(title, f'<img alt="{title}" src="{source}">', note=note)


def _styles(rows: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and line style of each row, by label: the same in every figure."""
    styles = [(colour, dashes) for dashes in ("-", "--", ":") for colour in COLOURS]
    return {label: styles[index % len(styles)] for index, label in enumerate(sorted(rows["label"]))}


def _draw_curves(figure: Figure, summary: Summary, rows: pd.DataFrame) -> None:
    """Accuracy on the tasks so far, retention and perplexity ratio over the stages, one line per method."""
    so_far = {run: pd.Series([nan, *accuracy_so_far(matrix)]) for run, matrix in summary.matrices.items()}
    accuracy = pd.concat(so_far, names=["run", "stage"]).rename("accuracy")
    stages, panels = summary.retention.join(accuracy, on=["run", "stage"]), figure.subplots(1, 3)
    for panel, (measure, title) in zip(panels, CURVES.items(), strict=True):
        for label, (colour, dashes) in _styles(rows).items():
            own = stages[stages["run"].isin(rows["runs"][label])].groupby("stage")[measure]
            over, marker = own.agg(["mean", "min", "max"]), "o" if own.ngroups < 4 else None
            panel.plot(over["mean"], color=colour, linestyle=dashes, label=label, marker=marker)
            panel.fill_between(over.index, over["min"], over["max"], color=colour, alpha=0.15, linewidth=0)
        for level in rows.iloc[0][["base_accuracy", "chance_accuracy"]] if measure == "accuracy" else [1.0]:
            panel.axhline(level, color=FAINT, linestyle=":")
        panel.set(title=title, xlabel="stage", yscale="log" if measure == "perplexity_ratio" else "linear")
        panel.grid(axis="y", alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(rows), 6))


def _draw_trade_off(figure: Figure, rows: pd.DataFrame) -> None:
    """Retention, and forgetting, against learning accuracy, one point per method."""
    for panel, measure, better in zip(figure.subplots(1, 2), ("retention", "forgetting"), ("up", "down"), strict=True):
        for label, (colour, _) in _styles(rows).items():
            (x, y), high = (rows.loc[label, ["learning_accuracy" + end, measure + end]] for end in ("", "_high"))
            x_half, y_half = np.nan_to_num([high.iloc[0] - x, high.iloc[1] - y])
            panel.errorbar(x, y, xerr=x_half, yerr=y_half, fmt="o", color=colour, elinewidth=0.8)
            panel.annotate(label, (x, y), xytext=(6, 5), textcoords="offset points", color=colour)
        panel.set(title=f"{measure.capitalize()} ({better} and right is better)", xlabel="learning accuracy")
        panel.grid(alpha=0.3)
        panel.margins(0.15)


def _draw_matrices(figure: Figure, summary: Summary, rows: pd.DataFrame) -> None:
    """The score matrix of each method, one block."""
    panels = figure.subplots(-(-len(rows) // 4), 4, squeeze=False).ravel()
    blocks = summary.records.runs.set_index("run")[BLOCK]
    for panel, label, runs in zip(panels, rows["label"], rows["runs"], strict=False):
        run = blocks.loc[runs].sort_values(BLOCK, kind="stable").index[0]
        matrix = summary.matrices[run]
        image = panel.imshow(matrix, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        panel.set(title="{}, order {}, seed {}".format(label, *blocks.loc[run]), xticks=[], yticks=[])
        if panel in panels[::4]:
            stages = summary.retention[summary.retention["run"] == run]
            panel.set_yticks(stages["stage"], stages["stage_name"], fontsize=6)
        for task in range(min(len(matrix) - 1, matrix.shape[1])):  # the cell of a task's own stage
            panel.plot([task - 0.5, task + 0.5], [task + 1.5, task + 1.5], color="white", linewidth=0.8)
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    figure.colorbar(image, ax=list(panels), label="score", shrink=0.8)


def _draw_cost(figure: Figure, rows: pd.DataFrame) -> None:
    """Seconds by use, peak memory and trainable parameters of each method, mean over blocks."""
    panels, left = figure.subplots(1, 3, sharey=True), 0.0
    for part, colour in (("train", COLOURS[0]), ("probe", COLOURS[5]), ("other", FAINT)):
        panels[0].barh(rows["label"], rows[f"seconds_{part}"], left=left, color=colour, label=part)
        left = left + rows[f"seconds_{part}"]
    panels[0].legend(ncols=3, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12))
    panels[0].set(title="Seconds of wall time per run", ylim=(len(rows) - 0.5, -0.5))
    panels[1].barh(rows["label"], rows["peak_memory_bytes"] / 2**20, color=COLOURS[2])
    panels[1].set_title("Peak memory, MiB")
    panels[2].barh(rows["label"], rows["trainable_parameters"], color=COLOURS[3])
    panels[2].set_title("Trainable parameters")

"""The report: one self-contained HTML file with tables, plots and where every number comes from.

`python -m clbench.report [results_dir]` writes report.html, which needs no network and no script. Equal runs give equal
bytes. Not here: how a number is worked out (statistics, metrics).
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from html import escape
from io import BytesIO
from itertools import groupby
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clbench.record.runs import Run, read_runs
from clbench.report.metrics import Floats, accuracy_so_far
from clbench.report.summary import Entry, entries, stage_retention, tied_with_best
from clbench.report.tables import (
    KEY_COLUMNS,
    LEGEND,
    MARKED,
    cell_text,
    references,
    replace_file,
    unranked,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; a second round is dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
INK, FAINT = "#1f2933", "#9aa5b1"
RC = {
    "svg.hashsalt": "clbench",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "legend.frameon": False,
}
CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;background:#f5f7fa;margin:0}
main{max-width:1180px;margin:0 auto;padding:24px}
h1{font-size:26px;margin:8px 0}h2{font-size:20px;margin:36px 0 4px}h3{font-size:15px;margin:0 0 6px}
section{background:#fff;border:1px solid #e4e7eb;border-radius:8px;padding:16px 18px;margin:14px 0;overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;width:100%}
th{text-align:right;color:#52606d;font-weight:600;border-bottom:2px solid #cbd2d9;padding:4px 8px;white-space:nowrap}
td{text-align:right;border-bottom:1px solid #e4e7eb;padding:4px 8px;white-space:nowrap}
th:first-child,td:first-child,.text th,.text td,td:last-child,th:last-child{text-align:left}
td:last-child{white-space:normal;min-width:140px}.text td{font-family:ui-monospace,monospace;font-size:12px}
img{max-width:100%;height:auto;display:block}p{margin:4px 0 10px}.note{color:#52606d;font-size:13px}
"""


def write(results_dir: Path) -> Path:
    """Writes report.html from the runs under `results_dir` and returns its path."""
    runs = read_runs(results_dir)
    path = results_dir / "report.html"
    replace_file(path, _page(runs))
    return path


def _page(runs: Sequence[Run]) -> str:
    """The whole page."""
    body = [f"<h1>What was learned, what was kept, what it cost</h1><p>{escape(unranked(runs))}</p>"]
    for (stream, order, model, data), group in groupby(entries(runs), key=lambda entry: entry.setting):
        body.append(f"<h2>{escape(f'stream {stream}, order {order}, model {model}, data {data}')}</h2>")
        body += _setting(tuple(group))
    if runs:
        body.append(f"<h2>Where the numbers come from</h2>{_card('Runs', _provenance(runs), kind='text')}")
    head = f'<meta charset="utf-8"><title>clbench report</title><style>{CSS}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>\n'


def _setting(rows: Sequence[Entry]) -> Iterator[str]:
    """The cards of one stream, order and model."""
    legend = escape(LEGEND).replace("**Bold**", "<strong>Bold</strong>")
    yield _card("Leaderboard", f"<p>{escape(references(rows[0]))}</p>{_leaderboard(rows)}", note=legend)
    yield _card(
        "Over the stream",
        _image(
            lambda figure: _draw_curves(figure, rows), size=(11, 3.6), alt="Accuracy, retention, perplexity by stage"
        ),
        note="Mean over seeds; the band reaches from the lowest seed to the highest. Stage 0 is the untouched model.",
    )
    yield _card(
        "Learning against keeping",
        _image(
            lambda figure: _draw_trade_off(figure, rows), size=(11, 3.8), alt="Retention and forgetting by learning"
        ),
        note="A method that learns little forgets little: compare methods at equal learning. Bars: 95 % over seeds.",
    )
    num_lines = -(-len(rows) // 4)
    yield _card(
        "Score of every task after every stage",
        _image(lambda figure: _draw_matrices(figure, rows), size=(11, 2.9 * num_lines + 0.3), alt="Score matrices"),
        note="Down: stages, the untouched model on top. Across: tasks in stream order. One seed a method, the lowest.",
    )
    yield _card("Cost", _image(lambda figure: _draw_cost(figure, rows), size=(11, 0.9 + 0.34 * len(rows)), alt="Cost"))


def _card(title: str, content: str, *, note: str = "", kind: str = "") -> str:
    """A titled box; `content` and `note` are HTML."""
    text = f'<p class="note">{note}</p>' if note else ""
    return f'<section class="{kind}"><h3>{escape(title)}</h3>{content}{text}</section>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of plain text cells; a cell in ** ** is strong."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = ["".join(f"<td>{_strong(cell)}</td>" for cell in row) for row in rows]
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"
    )


def _strong(cell: str) -> str:
    """A cell's text as HTML."""
    return f"<strong>{escape(cell.strip('*'))}</strong>" if cell.startswith("**") else escape(cell)


def _leaderboard(rows: Sequence[Entry]) -> str:
    """The leaderboard of one setting."""
    marks = {measure: tied_with_best(rows, measure=measure) for measure in MARKED}
    lines = [
        [
            row.label,
            str(row.n_seeds),
            *(cell_text(row, name, form, marks, spread=name in MARKED) for _, name, form in KEY_COLUMNS),
            "; ".join(row.notes),
        ]
        for row in rows
    ]
    return _table(["method", "seeds", *(heading for heading, _, _ in KEY_COLUMNS), "notes"], lines)


def _provenance(runs: Sequence[Run]) -> str:
    """Every run, ranked or not: its state, commit, configuration and command."""
    lines = []
    for run in runs:
        known = bool(run.manifest) and run.state != "unreadable"
        commit = f"{run.commit[:12] or 'none'}{' (dirty)' if run.is_dirty else ''}" if known else ""
        config_hash = str(run.manifest["config_hash"])[:12] if known else ""
        command = str(run.manifest.get("command", "")) if known else run.problem
        lines.append([run.name, run.state, commit, config_hash, run.variant if known else "", command])
    return _table(["run", "state", "commit", "config", "variant", "command"], lines)


def _image(draw: Callable[[Figure], None], *, size: tuple[float, float], alt: str) -> str:
    """What `draw` puts on a figure of `size` inches, as an <img> that carries its own data."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        stream = BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{b64encode(stream.getvalue()).decode()}">'


def _styles(rows: Sequence[Entry]) -> dict[str, tuple[str, str]]:
    """Colour and line style of each row, by label: the same in every figure."""
    labels = sorted(row.label for row in rows)
    return {
        label: (COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]) for i, label in enumerate(labels)
    }


def _draw_curves(figure: Figure, rows: Sequence[Entry]) -> None:
    """Accuracy on the tasks so far, retention and perplexity ratio over the stages, one line per method."""
    from matplotlib.ticker import LogFormatter

    panels = figure.subplots(1, 3)
    titles = ("Accuracy on the tasks so far", "Retention of base knowledge", "Perplexity ratio to the untouched model")
    styles = _styles(rows)
    for panel, title, curve in zip(panels, titles, (_accuracy_curve, *map(_kept_curve, KEPT)), strict=True):
        for row in rows:
            _draw_band(panel, [curve(run) for run in row.runs], label=row.label, style=styles[row.label])
        panel.set_title(title)
        panel.set_xlabel("stage")
        panel.grid(axis="y", color="#e4e7eb")
        panel.xaxis.get_major_locator().set_params(integer=True)
    first = rows[0].mean
    for name, level, at in (("untouched", first.base_accuracy, 0.01), ("chance", first.chance_accuracy, 0.85)):
        if not isnan(level):
            panels[0].axhline(level, color=FAINT, linestyle=":", linewidth=1)
            panels[0].annotate(name, (at, level), xycoords=("axes fraction", "data"), va="bottom", color=FAINT)
    panels[2].set_yscale("log")
    panels[2].yaxis.set_major_formatter(LogFormatter())
    panels[2].yaxis.set_minor_formatter(LogFormatter())
    for panel in panels[1:]:
        panel.axhline(1.0, color=FAINT, linestyle=":", linewidth=1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(rows), 8))


KEPT = ("retention", "perplexity_ratio")


def _accuracy_curve(run: Run) -> Floats:
    """Mean score on the tasks trained so far after each stage, (stages + 1,); stage 0 has none."""
    return np.concatenate([[nan], accuracy_so_far(run.matrix)])


def _kept_curve(name: str) -> Callable[[Run], Floats]:
    """A reader of one column of retention.csv over a run's stages, (stages + 1,)."""

    def curve(run: Run) -> Floats:
        return np.array([vars(stage_retention(run, stage=stage))[name] for stage in range(run.last_stage + 1)])

    return curve


def _draw_band(panel: Axes, curves: Sequence[Floats], *, label: str, style: tuple[str, str]) -> None:
    """Mean line of several seeds' curves and the band from the lowest to the highest."""
    length = max(len(curve) for curve in curves)
    values = np.array([np.pad(curve, (0, length - len(curve)), constant_values=nan) for curve in curves])
    colour, dashes = style
    stages = np.arange(length)
    marker = "o" if length < 4 else None
    panel.plot(stages, values.mean(axis=0), color=colour, linestyle=dashes, label=label, linewidth=1.6, marker=marker)
    if len(curves) > 1:
        panel.fill_between(stages, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _draw_trade_off(figure: Figure, rows: Sequence[Entry]) -> None:
    """Retention, and forgetting, against learning accuracy, one point per method."""
    panels = figure.subplots(1, 2)
    styles = _styles(rows)
    for panel, measure in zip(panels, ("retention", "forgetting"), strict=True):
        for row in rows:
            x, y = row.mean.learning_accuracy, vars(row.mean)[measure]
            spread = (row.high.learning_accuracy - x, vars(row.high)[measure] - y)
            errors = [None if isnan(half) else half for half in spread]
            panel.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="o", color=styles[row.label][0], elinewidth=0.8)
            panel.annotate(row.label, (x, y), xytext=(6, 5), textcoords="offset points", color=styles[row.label][0])
        panel.set_xlabel("learning accuracy (mean score right after a task's own stage)")
        panel.grid(color="#e4e7eb")
        panel.margins(0.15)
    panels[0].set_title("Retention of base knowledge (up and right is better)")
    panels[1].set_title("Forgetting of the stream's tasks (down and right is better)")


def _draw_matrices(figure: Figure, rows: Sequence[Entry]) -> None:
    """The score matrix of each method, one seed."""
    panels = figure.subplots(-(-len(rows) // 4), 4, squeeze=False).ravel()
    image = None
    for panel, row in zip(panels, rows, strict=False):
        run = min(row.runs, key=lambda run: (run.seed, run.name))
        image = panel.imshow(run.matrix, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        panel.set_title(f"{row.label}, seed {run.seed}")
        panel.set_xticks([])
        panel.set_yticks([])
        if panel in panels[::4]:
            panel.set_yticks(list(run.stage_names), list(run.stage_names.values()), fontsize=6)
        for task in range(min(run.last_stage, run.matrix.shape[1])):  # the cell of a task's own stage
            panel.plot([task - 0.5, task + 0.5], [task + 1.5, task + 1.5], color="white", linewidth=0.8)
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="score", shrink=0.8)


def _draw_cost(figure: Figure, rows: Sequence[Entry]) -> None:
    """Seconds by use, peak memory and trainable parameters of each method, mean over seeds."""
    panels = figure.subplots(1, 3, sharey=True)
    labels = [row.label for row in rows]
    left = np.zeros(len(rows))
    for part, colour in (("train", COLOURS[0]), ("probe", COLOURS[5]), ("other", FAINT)):
        seconds = np.array([vars(row.mean)[f"seconds_{part}"] for row in rows])
        panels[0].barh(labels, seconds, left=left, color=colour, label=part, height=0.65)
        left = left + seconds
    panels[0].legend(ncols=3, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12))
    panels[1].barh(labels, [row.mean.peak_memory_bytes / 2**20 for row in rows], color=COLOURS[2], height=0.65)
    panels[2].barh(labels, [row.mean.trainable_parameters for row in rows], color=COLOURS[3], height=0.65)
    titles = ("Seconds of wall time per run", "Peak memory, MiB", "Trainable parameters")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
    panels[0].invert_yaxis()

"""The papers' numbers with ours beside them: a juxtaposition, never a reproduction."""

from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path

import pandas as pd

from clbench.report.measures import BLOCK, KNOWLEDGE_PROBE, MATRIX_PROBE, PERPLEXITY_PROBE
from clbench.report.summary import Summary, over_blocks

PLACES = (Path(__file__).parents[1] / "published.csv", Path(__file__).parents[2] / "results" / "published.csv")
"""The file of published numbers: in an installed package, in the project."""

NOTE = """\
Ours: mean over seeds, in the published order, with its 95 % interval.
Models, budgets, prompts and scoring differ: a juxtaposition, not a reproduction.
Rates are fractions of 1. primary: read in the paper or in its authors' logs; transcribed: through somebody else's copy;
unverified: could not be checked. base: before training; end: after the last stage."""
PROBES = [MATRIX_PROBE, KNOWLEDGE_PROBE, PERPLEXITY_PROBE]
"""Secondary views of a method's weights are probes of their own and never compared."""


def beside(summary: Summary, rows: pd.DataFrame) -> pd.DataFrame:
    """The published numbers of the streams of `rows`, leaderboard rows, with `label`, `n_seeds`, `mean`, `low` and `high` of ours.

    Ours is of the same stream, method, task, stage and metric, whatever the model: one row for each variant that measured
    it, NaN where none did. Runs of only some tasks of a stream, or in another order, are not of the published one.
    """
    runs, found = summary.records.runs.set_index("run"), []
    whole = [
        own["tasks"] == own["config"].get("stream", {}).get("tasks")
        for _, own in runs.loc[summary.measures.index].iterrows()
    ]
    measures = summary.measures[whole]
    rows = rows.assign(runs=[measures.index.intersection(names) for names in rows["runs"]])
    rows = rows[rows["runs"].map(len) > 0]
    published = pd.read_csv(next(path for path in PLACES if path.is_file()), keep_default_na=False)
    published = published[published["stream"].isin(rows["stream"])]
    for _, row in rows.iterrows():
        own, values = runs.loc[row["runs"]], _values(summary.records.scores, row["runs"])
        stated = (published["stream"] == row["stream"]) & (published["method"] == row["method"])
        for paper in published[stated].itertuples():
            if not paper.task and paper.after == "end" and paper.metric in measures:
                ours = measures.loc[row["runs"], paper.metric]
            else:
                ours = [values.get((run, paper.after, paper.task, paper.metric), nan) for run in row["runs"]]
            found.append((paper.Index, row["label"], own["seed"].nunique(), *over_blocks(ours, own[BLOCK])))
    ours = pd.DataFrame(found, columns=["number", "label", "n_seeds", "mean", "low", "high"]).set_index("number")
    return published.join(ours[ours["mean"].notna()])


def as_text(published: pd.DataFrame) -> pd.DataFrame:
    """What `beside` gives, to read: ours as one cell."""
    cells = []
    for one in published.itertuples():
        interval = "" if isnan(one.low) else f" [{one.low:.3f}, {one.high:.3f}]"
        cells.append("-" if isnan(one.mean) else f"{one.mean:.3f}{interval}, n = {one.n_seeds:.0f}, {one.label}")
    shown = published.drop(columns=["arxiv", "stream", "label", "n_seeds", "mean", "low", "high"])
    shown["value"] = published["value"].map("{:.10g}".format)
    shown.insert(shown.columns.get_loc("value") + 1, "ours", cells)
    return shown


def _values(scores: pd.DataFrame, runs: Sequence[str]) -> dict[tuple[str, str, str, str], float]:
    """Every score of some runs by run, stage (its name, and `base` or `end`), task and metric."""
    own = scores[scores["run"].isin(runs) & scores["probe"].isin(PROBES)]
    named = own.assign(after=own["stage_name"].where(own["stage"] > 0, "base"))
    last = own.assign(after="end")[own["stage"] == own.groupby("run")["stage"].transform("max")]
    return pd.concat([named, last]).set_index(["run", "after", "task", "metric"])["value"].to_dict()

"""What the figures of the report show: one record of names and numbers for each setting, which report.js draws.

Numbers have six significant digits, null where they do not exist. Not here: how one is worked out (summary) or drawn (report.js).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd

from clbench.report.columns import LEADERBOARD, RETENTIONS
from clbench.report.measures import BLOCK, RANKED, SETTING
from clbench.report.metrics import FLIPS, accuracy_so_far
from clbench.report.summary import Summary, over_blocks

DRAWN = (
    *("average_accuracy", "learning_accuracy", "forgetting", "bwt", "retention", "retention_probability"),
    *("perplexity_ratio", "kl_to_base", "update_norm"),
    *("tokens_trained", "flops", "seconds_train", "peak_memory_bytes", "trainable_parameters"),
)
"""The measures of the leaderboard that figures show."""
CORRECTED = [name for name in FLIPS if name.endswith("corrected")]
OVER_STAGES = ("accuracy", "retention", "retention_probability", "perplexity_ratio")
OF_BANDS = ("retention", "retention_probability", "before", "lost_corrected", "gained_corrected")
BAND = r"_x(\d+)$"
"""How the base-knowledge task of a frequency band ends: how often the text stated its facts."""
VARIANT, RATE = re.compile(r"variant: ([^;]*)"), re.compile(r"(?:, |^)train\.lr=([^,]+)")
AXES = {
    **{one.name: f"{one.name.replace('_', ' ')} ({one.unit})" for one in (*LEADERBOARD, *RETENTIONS)},
    "accuracy": "accuracy on the tasks so far (fraction of 1)",
    "before": "accuracy of the untouched model (fraction of 1)",
    "kl_to_base": "KL to the untouched model (nats per token)",
    "update_norm": "size of the update (share of the untouched weights)",
    "log_perplexity_ratio": "log of perplexity ratio (nats per token)",
}
"""What an axis says: the measure and its unit."""


def of_setting(summary: Summary, rows: pd.DataFrame, tuning: Path) -> dict[str, Any]:
    """The record of the setting that `rows`, leaderboard rows, share; `tuning` is the leaderboard.csv of a search, which need not exist."""
    first = rows.iloc[0]
    return {
        "axes": AXES,
        "methods": [_method(summary, row) for _, row in rows.iterrows()],
        "references": {"untouched model": _short(first["base_accuracy"]), "chance": _short(first["chance_accuracy"])},
        "stages": _over_stages(summary, rows),
        "bands": _over_bands(summary, rows),
        "matrices": list(_matrices(summary, rows)),
        "pairs": _pairs(summary.differences, rows),
        "tuning": list(_tuning(tuning, first)),
    }


def as_script(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as JSON that can stand in a script element, whatever the names in it: without `<`, nothing ends or opens one."""
    return json.dumps(list(records), separators=(",", ":"), allow_nan=False).replace("<", r"\u003c")


def _short(value: float) -> float | None:
    return None if pd.isna(value) else float(f"{value:.6g}")


def _method(summary: Summary, row: pd.Series) -> dict[str, Any]:
    """A row of the leaderboard: of each measure mean, low and high, of each ranked one the best and the worst rank."""
    measures = {name: [_short(row[name + end]) for end in ("", "_low", "_high")] for name in DRAWN}
    last = summary.retention.drop_duplicates("run", keep="last").set_index("run").reindex(row["runs"])
    blocks = summary.records.runs.set_index("run").loc[row["runs"], BLOCK]
    for name in CORRECTED:
        measures[name] = [_short(value) for value in over_blocks(last[name], blocks)]
    ranks = {name: [_short(row[f"{name}_rank_{end}"]) for end in ("best", "worst")] for name in RANKED}
    return {"label": row["label"], "method": row["method"], "measures": measures, "ranks": ranks}


def _over_stages(summary: Summary, rows: pd.DataFrame) -> dict[str, Any]:
    so_far = {run: pd.Series([nan, *accuracy_so_far(matrix)]) for run, matrix in summary.matrices.items()}
    accuracy = pd.concat(so_far, names=["run", "stage"]).rename("accuracy")
    stages = summary.retention.join(accuracy, on=["run", "stage"])
    return {measure: _lines(stages, rows, over="stage", measure=measure) for measure in OVER_STAGES}


def _over_bands(summary: Summary, rows: pd.DataFrame) -> dict[str, Any]:
    """Base knowledge after the last stage, over how often the model's text stated a fact."""
    last = summary.probes.drop_duplicates(["run", "task"], keep="last")
    last = last.assign(times=last["task"].str.extract(BAND, expand=False).astype(float)).dropna(subset="times")
    return {measure: _lines(last, rows, over="times", measure=measure) for measure in OF_BANDS}


def _lines(table: pd.DataFrame, rows: pd.DataFrame, *, over: str, measure: str) -> dict[str, list[Any]]:
    """By label [x, mean, lowest, highest] of `measure` over the runs of a row, for each x of the column `over`."""
    lines = {}
    for label, runs in zip(rows["label"], rows["runs"], strict=True):
        own = table[table["run"].isin(runs)].dropna(subset=measure).groupby(over)[measure]
        if own.ngroups:
            lines[label] = [
                [_short(value) for value in point] for point in own.agg(["mean", "min", "max"]).itertuples()
            ]
    return lines


def _matrices(summary: Summary, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Of each run the score of every task (in the order of the run) after every stage."""
    runs = summary.records.runs.set_index("run")
    for label, own in zip(rows["label"], rows["runs"], strict=True):
        for run, row in runs.loc[own].sort_values(BLOCK, kind="stable").iterrows():
            stages = summary.retention.loc[summary.retention["run"] == run, "stage_name"]
            scores = [[_short(value) for value in scores] for scores in summary.matrices[run]]
            name = f"{label}, order {row['order']}, seed {row['seed']}"
            yield {"name": name, "stages": list(stages), "tasks": list(row["tasks"]), "scores": scores}


def _pairs(differences: pd.DataFrame, rows: pd.DataFrame) -> dict[str, list[list[Any]]]:
    """By measure [place of the first row, of the second, verdict, difference, low, high, q, blocks needed] of each pair of `rows`."""
    places = {(row.method, row.variant): place for place, row in enumerate(rows.itertuples())}
    pairs: dict[str, list[list[Any]]] = {}
    for one in differences[(differences[SETTING] == rows.iloc[0][SETTING]).all(axis=1)].itertuples():
        numbers = map(_short, (one.difference, one.low, one.high, one.q, one.blocks_needed))
        first, second = places[one.method, one.variant], places[one.other, one.other_variant]
        pairs.setdefault(one.measure, []).append([first, second, one.verdict, *numbers])
    return pairs


def _tuning(path: Path, first: pd.Series) -> Iterator[dict[str, Any]]:
    """Learning-rate curves: the variants of a method in a search on the same stream and model that differ in train.lr alone, slowest first."""
    if not path.is_file():
        return
    tuned = pd.read_csv(path, keep_default_na=False, na_values={name: "" for name in DRAWN})
    tuned = tuned[(tuned["stream"] == first["stream"]) & (tuned["model"] == first["model"])]
    settings = tuned["notes"].str.extract(VARIANT, expand=False).fillna("")
    rates = pd.to_numeric(settings.str.extract(RATE, expand=False), errors="coerce")  # a rate of None is on no curve
    tuned = tuned.assign(rate=rates, others=settings.str.replace(RATE, "", regex=True)).dropna(subset="rate")
    for (method, others), own in tuned.sort_values("rate").groupby(["method", "others"]):
        points = [{name: _short(row[name]) for name in ("rate", *DRAWN)} for _, row in own.iterrows()]
        if len(points) > 1:
            yield {"method": method, "others": others.strip(", "), "points": points}

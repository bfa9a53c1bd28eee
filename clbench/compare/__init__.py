"""How two runs differ by probe and task after their last stages, question by question where both have answered the same.

A run is one order and one seed, so an interval here is about questions: what others of their kind would have given. Of shares of 1 it is
`metrics.paired_interval`, of nats the paired Student-t interval. Whether two methods differ is for differences.csv to say, over blocks.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from clbench.config import identity
from clbench.record import examined
from clbench.record.runs import CANARIES, read_runs
from clbench.report import metrics
from clbench.report.measures import ITEM_METRICS, KNOWLEDGE_PROBE, MATRIX_PROBE, PROBABILITY
from clbench.types import UserMistake

Key = tuple[str, str, str]
"""A probe, a task and a metric."""
SHARES = (MATRIX_PROBE, KNOWLEDGE_PROBE)
"""Probes whose outcomes are shares of 1, of the questions that their data say; what others read depends on the tokenizer, too."""
ROUNDING = 1e-6
"""Items are kept in float32."""
APART = (CANARIES, "data")
"""What a run says of itself, and not of its model."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One run, or RUN@VIEW, after its last stage: the value of each score, and its items (items,) where they make it.

    The items are in the value's unit, which is their mean. `asked`: of each examination on other probes what it says of itself; under "" the
    run's manifest.
    """

    name: str
    stage: int
    values: Mapping[Key, float]
    items: Mapping[Key, metrics.Floats]
    asked: Mapping[str, Mapping[str, Any]]

    def questions(self, probe: str, task: str) -> Any:
        """What is equal where a probe's items are of the same questions, in the same order."""
        examination, _, own = probe.rpartition("/")
        manifest, data = self.asked[""], self.asked[examination]["probe_data"]
        if own == MATRIX_PROBE:
            return manifest["data"][task]["test_sha256"]
        if own == KNOWLEDGE_PROBE:
            return data[f"{own} {task}"]
        settings = {key: value for key, value in identity(manifest["config"]).items() if key.startswith("probe.")}
        return data, manifest["model_fingerprint"], examination or settings

    def shown(self, probe: str, task: str) -> list[str]:
        """The metrics by which a probe's task is compared: of a task of the stream its own, of one of base knowledge accuracy and probability, else
        those that have items, or all where none has."""
        own, measured = examined.probe_of(probe), [metric for *at, metric in self.values if at == [probe, task]]
        if own in APART:
            return []
        if own == MATRIX_PROBE:
            return [self.asked[""]["metrics"].get(task)]
        if own == KNOWLEDGE_PROBE:
            return [*[metric for metric in ITEM_METRICS if metric in measured][:1], PROBABILITY]
        return [metric for metric in measured if (probe, task, metric) in self.items] or measured


@dataclass(frozen=True, kw_only=True)
class Row:
    """One score of both; `low` and `high` bound the difference, first less second, over `n_items` paired items, NaN where there are none."""

    key: Key
    first: float
    second: float
    n_items: int = 0
    low: float = nan
    high: float = nan


def read_side(path: Path) -> Side:
    """The run recorded at `path`, results_dir/runs/NAME, or NAME@VIEW for a secondary view of its weights."""
    path = path.resolve()
    run = path.name.partition("@")[0]
    # One that only runs.tar.xz holds is found by reading all.
    records = read_runs(path.parents[1], only=run if (path.parent / run).is_dir() else None).by_view()
    own = records.scores[records.scores["run"] == path.name]
    if own.empty:
        known = [name for name in records.runs["run"] if name.partition("@")[0] == run]
        raise UserMistake(
            f"{path} is no run with scores; name one of results_dir/runs{', as ' if known else ''}{', '.join(known)} "
            "(clbench.verify says what is wrong with a record)"
        )
    stage = int(own["stage"].max())
    own = own[own["stage"] == stage]
    files, asked = records.files[run], {"": json.loads(records.files[run]["manifest.json"])}
    for name in {probe.partition("/")[0] for probe in own["probe"] if "/" in probe}:
        asked[name] = examined.read(files, file=f"{examined.FOLDER}/{name}.jsonl", run=run)[-1]["asked"]
    kept, values, items = records.outcomes(path.name, stage=stage, of=""), {}, {}
    for one in own.itertuples():
        key = one.probe, one.task, one.metric
        values[key], outcomes = one.value, kept.get("|".join(key), np.empty(0))
        # A text's items are nats of texts and its value is nats a token; a mean of tasks' means is no mean of items.
        scaled = outcomes * len(outcomes) / one.n
        if len(scaled) and abs(scaled.mean() - one.value) <= ROUNDING * max(1, abs(one.value)):
            items[key] = scaled
    return Side(name=path.name, stage=stage, values=values, items=items, asked=asked)


def compare(first: Side, second: Side) -> list[Row]:
    """What both measured after their last stages, in the order of the first."""
    common = [key for key in first.values if key in second.values]
    return [row(key, first, second) for key in common if key[2] in first.shown(*key[:2])]


def row(key: Key, first: Side, second: Side) -> Row:
    """One score, paired where both kept the items of the same questions."""
    probe, task, _ = key
    plain = Row(key=key, first=first.values[key], second=second.values[key])
    one, other = (side.items.get(key, np.empty(0)) for side in (first, second))
    if len(one) != len(other) or not len(one) or first.questions(probe, task) != second.questions(probe, task):
        return plain
    is_share = examined.probe_of(probe) in SHARES
    low, high = metrics.paired_interval(one, other) if is_share else metrics.interval((one - other).tolist())[1:]
    return replace(plain, n_items=len(one), low=low, high=high)

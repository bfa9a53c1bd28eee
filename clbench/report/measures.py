"""What methods are compared by: each measure of a run and the items behind it, put together for every pair of methods.

A further measure is one more entry of COMPARED. Not here: how a difference is judged (differences), what else the leaderboard shows (summary).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from math import log, nan
from typing import Any

import numpy as np
import pandas as pd

from clbench.record.runs import Records
from clbench.report import differences
from clbench.report.columns import columns_of
from clbench.report.metrics import Floats

MATRIX_PROBE, KNOWLEDGE_PROBE, PERPLEXITY_PROBE, DIVERGENCE_PROBE = "stream", "knowledge", "perplexity", "divergence"
UPDATE_PROBE = "update"
ITEM_METRICS = ["acc_norm", "acc", "exact_match,flexible-extract", "exact_match"]
"""What an item of a base-knowledge task is scored by: the first of these that the task has."""
PROBABILITY = "probability"
"""What it is scored by for retention_probability: the probability of the right choice among the choices."""

SETTING = ["stream", "model", "stream_hash"]
"""What a method is compared on: the stream, the model and the hash of the stream's data, whatever the order of its tasks."""
BLOCK = ["order", "seed"]
"""What two methods have in common that are compared run by run."""
RANKED = ("average_accuracy", "retention")
"""The measures whose rank intervals stand in the leaderboard."""
RANKS = [f"{name}_{end}" for name in RANKED for end in ("rank_best", "rank_worst")]

Items = Mapping[str, Floats]
"""Per-item parts of a measure by group, (items,): the means of the groups add up to the measure. Empty where items were not kept."""


def one_name_each(runs: pd.DataFrame) -> pd.Series:
    """The order of each run, under one name where several arrange a stream's tasks alike, as latin:4 and latin:1 do three: they are one block."""
    tasks = runs["tasks"].map(tuple).rename("sequence")
    return runs.groupby([*SETTING, tasks])["order"].transform("min")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's records, as far as items are made of them.

    `tasks` stand in the order in which they were trained, `primary` has each one's metric, `last` is the last stage, `scores` and `knowledge` are the
    run's rows of Records.scores and of `knowledge_tasks`, `outcomes` is Records.outcomes of this run.
    """

    tasks: Sequence[str]
    primary: Mapping[str, str]
    last: int
    scores: pd.DataFrame
    knowledge: pd.DataFrame
    outcomes: Callable[..., Items]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number that methods are compared by: `scale` of the leaderboard's measure `column`, and the `items` that it is made of."""

    name: str
    column: str
    items: Callable[[Run], Items]
    scale: Callable[[float], float] = float
    lower_is_better: bool = False


def compare(
    records: Records, ranked: pd.DataFrame, *, measured: pd.DataFrame, rows: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table differences.csv, and for each of `rows` the columns RANKS, NaN where it has none.

    `ranked` and `measured` have one row per run, by name: what Records.runs says, and the measures of the leaderboard, which is `rows`. Rows that
    trained nothing are references and do not compete.
    """
    measures = [one for one in COMPARED if one.column in measured and measured[one.column].notna().any()]
    items = dict(_items(records, ranked, measures))
    found, ranks = [], pd.DataFrame(nan, index=rows.index, columns=RANKS)
    for setting, own in rows[rows["tokens_trained"] != 0].groupby(SETTING):
        for measure in measures:
            values = measured[measure.column].dropna().map(measure.scale)
            rivals = own[[not values.index.intersection(runs).empty for runs in own["runs"]]]
            parts = {run: items[run, measure.name] for run in values.index}
            arrays = blockwise([values[values.index.isin(runs)] for runs in rivals["runs"]], ranked[BLOCK], parts)
            pairs = differences.compare(**arrays, lower_is_better=measure.lower_is_better)
            names = rivals[["method", "variant"]].to_numpy().tolist()
            for one in pairs:
                numbers = [value for name, value in vars(one).items() if name not in ("first", "second")]
                found.append([*setting, measure.name, *names[one.first], *names[one.second], *numbers])
            if measure.name in RANKED:
                own_ranks = [f"{measure.name}_rank_best", f"{measure.name}_rank_worst"]
                ranks.loc[rivals.index, own_ranks] = differences.rank_intervals(pairs, count=len(rivals))
    table = pd.DataFrame(found, columns=columns_of("differences.csv"))
    return table.astype({"blocks_needed": "Int64"}), ranks.astype("Int64")


def blockwise(rows: Sequence[pd.Series], blocks: pd.DataFrame, parts: Mapping[str, Items]) -> dict[str, Any]:
    """`values`, `items` and `starts` as differences.compare takes them, of `rows`: each one's values by run.

    `blocks` has each run's BLOCK, `parts` its items. A block that was run twice is one replicate, the mean of the two.
    """
    block = {run: tuple(own) for run, *own in blocks.itertuples()}
    places = {name: place for place, name in enumerate(sorted({block[run] for row in rows for run in row.index}))}
    groups = sorted({(group, len(own)) for row in rows for run in row.index for group, own in parts[run].items()})
    ends = list(accumulate((size for _, size in groups), initial=0))
    values = np.full((len(rows), len(places)), nan)
    items = np.full((*values.shape, ends[-1]), nan)
    for number, row in enumerate(rows):
        for name, own in row.groupby(row.index.map(block.get)):
            values[number, places[name]] = own.mean()
            items[number, places[name]] = np.mean([_in_line(parts[run], groups) for run in own.index], axis=0)
    return {"values": values, "items": items, "starts": ends[:-1]}


def _in_line(parts: Items, groups: Sequence[tuple[str, int]]) -> Floats:
    """The items of one run in the order of `groups`, names and sizes, (items,): NaN where it has no such group."""
    found = [(parts.get(group, ()), size) for group, size in groups]
    return np.concatenate([[], *(own if len(own) == size else np.full(size, nan) for own, size in found)])


def knowledge_tasks(scores: pd.DataFrame) -> pd.DataFrame:
    """A row for each `run` and base-knowledge `task`: the `metric` of its items, its `floor` and its `chance` rate, from Records.scores.

    The floor is what needs no knowledge: the commonest right answer where that is more than chance; chance where the records have no majority.
    """
    measured = scores[(scores["stage"] == 0) & (scores["probe"] == KNOWLEDGE_PROBE)]
    cells = measured.pivot(index=["run", "task"], columns="metric", values="value")
    cells["metric"] = cells.reindex(columns=ITEM_METRICS).notna().idxmax(axis=1)
    cells = cells.reindex(columns=["metric", "chance", "majority"])
    return cells.assign(floor=np.fmax(cells["chance"], cells["majority"])).reset_index()


def _items(
    records: Records, ranked: pd.DataFrame, measures: Sequence[Measure]
) -> Iterator[tuple[tuple[str, str], Items]]:
    """The items of every run by its name and that of the measure."""
    scores, known = records.scores, knowledge_tasks(records.scores)
    for run, own in ranked.iterrows():
        one = Run(
            tasks=own["tasks"],
            primary=own["metrics"],
            last=own["stages"],
            scores=scores[scores["run"] == run],
            knowledge=known[known["run"] == run],
            outcomes=cache(partial(records.outcomes, run)),  # of this run alone, as those of all would fill the memory
        )
        yield from (((run, measure.name), measure.items(one)) for measure in measures)


def _answers(run: Run, stages: Sequence[int]) -> Items:
    """The outcome of every test question of each task after its one of `stages`; empty unless all were kept."""
    keys = [f"{MATRIX_PROBE}|{task}|{run.primary[task]}" for task in run.tasks]
    found = {key: run.outcomes(stage=at, of=key).get(key, np.empty(0)) for key, at in zip(keys, stages, strict=True)}
    return found if all(map(len, found.values())) else {}


def _average_accuracy(run: Run) -> Items:
    return {task: own / len(run.tasks) for task, own in _answers(run, [run.last] * len(run.tasks)).items()}


def _learning_accuracy(run: Run) -> Items:
    if run.last != len(run.tasks):
        return {}
    return {task: own / len(run.tasks) for task, own in _answers(run, range(1, run.last + 1)).items()}


def _bwt(run: Run) -> Items:
    """Of the last task, which has no part in it, zeros: all orders have the same groups."""
    learned, ended = _learning_accuracy(run), _average_accuracy(run)
    return {
        task: (ended[task] - own) * len(run.tasks) / max(len(run.tasks) - 1, 1)
        for task, own in learned.items()
        if ended
    }


def _retention(run: Run) -> Items:
    """By probe; from each one's floor."""
    return _kept(run, {f"{KNOWLEDGE_PROBE}|{one.task}|{one.metric}": one.floor for one in run.knowledge.itertuples()})


def _retention_probability(run: Run) -> Items:
    """By probe; guessing gives the right choice the chance rate."""
    return _kept(run, {f"{KNOWLEDGE_PROBE}|{one.task}|{PROBABILITY}": one.chance for one in run.knowledge.itertuples()})


def _kept(run: Run, floors: Mapping[str, float]) -> Items:
    """The items of retention, over those "probe|task|metric" of `floors` that have outcomes at stage 0.

    Retention R is a ratio of sums over probes of means, (after - floor) / D with D the sum of (before - floor); an item's part is its influence
    on that ratio, (after - floor - R (before - floor)) / D, and R / probes, so that the means add up to R (the infinitesimal jackknife, Efron
    1982).
    """
    first, last = (run.outcomes(stage=stage, of=f"{KNOWLEDGE_PROBE}|") for stage in (0, run.last))
    above = {
        key: (first[key] - floor, last.get(key, np.empty(0)) - floor) for key, floor in floors.items() if key in first
    }
    if not above or any(len(before) != len(after) for before, after in above.values()):
        return {}
    base = sum(before.mean() for before, _ in above.values())
    kept = sum(after.mean() for _, after in above.values()) / base
    return {key: (after - kept * before) / base + kept / len(above) for key, (before, after) in above.items()}


def _log_perplexity_ratio(run: Run) -> Items:
    """By collection of texts: how much each text's negative log-likelihood rose, over the tokens of a text of mean length."""
    scores = run.scores[(run.scores["probe"] == PERPLEXITY_PROBE) & (run.scores["metric"] == "nll_token")]
    found = {}
    for task, tokens in scores[scores["stage"] == run.last][["task", "n"]].itertuples(index=False):
        key = f"{PERPLEXITY_PROBE}|{task}|nll_token"
        before, after = (run.outcomes(stage=stage, of=key).get(key, np.empty(0)) for stage in (0, run.last))
        if not len(before) or len(before) != len(after):
            return {}
        found[key] = (after - before) * len(after) / tokens
    return {key: own / len(found) for key, own in found.items()}


def _kl_to_base(run: Run) -> Items:
    found = run.outcomes(stage=run.last, of=f"{DIVERGENCE_PROBE}|")
    return {key: own / len(found) for key, own in found.items()}


COMPARED = (
    Measure(name="average_accuracy", column="average_accuracy", items=_average_accuracy),
    Measure(name="learning_accuracy", column="learning_accuracy", items=_learning_accuracy),
    Measure(name="bwt", column="bwt", items=_bwt),
    Measure(name="retention", column="retention", items=_retention),
    Measure(name="retention_probability", column="retention_probability", items=_retention_probability),
    Measure(
        name="log_perplexity_ratio",
        column="perplexity_ratio",
        scale=log,
        items=_log_perplexity_ratio,
        lower_is_better=True,
    ),
    Measure(name="kl_to_base", column="kl_to_base", items=_kl_to_base, lower_is_better=True),
)
"""What differences.csv compares; a measure that no run has is left out."""

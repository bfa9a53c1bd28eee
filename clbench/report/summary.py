"""What runs amount to: one row per run and stage, one score matrix per run, one row per line of the leaderboard.

Applies the formulas of metrics to the records of runs. Not here: the files made of the result (tables, html).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from clbench.config import BLOCK_KEYS, identity
from clbench.record.runs import Records, read_runs
from clbench.report import differences, metrics
from clbench.report.columns import columns_of
from clbench.report.measures import (
    BLOCK,
    DIVERGENCE_PROBE,
    KNOWLEDGE_PROBE,
    MATRIX_PROBE,
    PERPLEXITY_PROBE,
    PROBABILITY,
    RANKS,
    SETTING,
    UPDATE_PROBE,
    compare,
    knowledge_tasks,
    one_name_each,
)
from clbench.types import FLOORS

NAMED = ["stream", "order", "model", "method"]
"""What a run is called by in tables that have a row per run or stage, beside its seed."""
SUMS = ["seconds_train", "seconds_probe", "seconds_other", "tokens_trained", "tokens_replayed"]
COSTS = {**dict.fromkeys(SUMS, "sum"), "trainable_parameters": "max", "peak_memory_bytes": "max", "flops": "sum"}
"""How the costs of a run's stages make that of the run."""
ROW = [*columns_of("leaderboard.csv"), "label", "runs"]
"""What is known of a row of the leaderboard."""

Matrices = Mapping[str, metrics.Floats]
Outcomes = Mapping[str, metrics.Floats]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the runs of a results directory amount to; scores are fractions of 1, NaN where a number does not exist.

    A secondary view of a run's weights counts as a run RUN@VIEW of a method METHOD@VIEW.

    `retention`: one row per run and stage, the columns of retention.csv. `probes`: one row per run, stage and base-knowledge task, the columns of
    probes.csv. `matrices`: by the name of a ranked run, each task's primary score after each stage, (stages + 1, tasks). `measures`: one row per
    ranked run, by name, the measures of the leaderboard. `leaderboard`: the ranked runs by setting, method and variant, best average accuracy first
    within a setting: the columns of leaderboard.csv, `label` (the method's name, with the variant where it has several) and `runs` (their names).
    `diverged`: the runs that diverged, in such rows with no measures. `differences`: one row per measure and pair of the leaderboard's rows, the
    columns of differences.csv.
    """

    records: Records
    retention: pd.DataFrame
    probes: pd.DataFrame
    matrices: Matrices
    measures: pd.DataFrame
    leaderboard: pd.DataFrame
    diverged: pd.DataFrame
    differences: pd.DataFrame

    @property
    def listed(self) -> pd.DataFrame:
        """All rows of the table: those of the leaderboard, and below them within a setting those that diverged, which have no rank."""
        if self.diverged.empty:
            return self.leaderboard
        # As objects: a count stays a whole number beside rows that have none.
        both = pd.concat([self.leaderboard.astype(object), self.diverged.astype(object)])
        return both.sort_values(SETTING, kind="stable", ignore_index=True)


def summarise(records: Records) -> Summary:
    """Works everything out, once."""
    records = records.by_view()
    runs, (retention, probes) = records.runs, retention_by_stage(records)
    runs = runs.assign(order=one_name_each(runs))
    ranked = runs[(runs["state"] == "complete") & (runs["problem"] == "")].set_index("run")
    matrices = dict(score_matrices(records.scores, ranked))
    ranked = ranked.assign(stages=[len(matrix) - 1 for matrix in matrices.values()])
    measures = _measures(records, ranked, retention, matrices)
    rows = _leaderboard(ranked, measures)
    pairs, ranks = compare(records, ranked, measured=measures, rows=rows)
    rows[RANKS] = ranks
    own = {"retention": retention, "probes": probes, "matrices": matrices, "measures": measures}
    diverged = _diverged(runs[runs["state"] == "diverged"])
    return Summary(records=records, **own, leaderboard=rows, diverged=diverged, differences=pairs)


def of_run(path: Path) -> Summary:
    """What the run recorded at `path` amounts to, alone."""
    return summarise(read_runs(path.parents[1], only=path.name))


def measured(path: Path, measure: str) -> float:
    """The `measure` of the run recorded at `path`, NaN where it is not ranked."""
    return float(of_run(path).measures[measure].get(path.name, nan))


def marks(rows: pd.DataFrame, measure: str) -> dict[str, str]:
    """By label, "best" for the row of one setting with the highest `measure`, "tied" for those that may be the best, too.

    A row may be the best where no other is separated from it as better. Rows that trained nothing are references and do not compete.
    """
    rivals = rows[rows[f"{measure}_rank_best"].notna()]
    best = rivals.sort_values(measure, ascending=False, kind="stable")[:1]
    tied = rivals[f"{measure}_rank_best"] == 1
    return dict.fromkeys(rivals["label"][tied], "tied") | dict.fromkeys(best["label"], "best")


def over_blocks(values: ArrayLike, blocks: pd.DataFrame) -> tuple[float, float, float]:
    """Mean over blocks (order and seed) of one value a run, and the bounds of its 95 % interval; a block that was run twice is one replicate."""
    return metrics.interval(_block_means(values, blocks))


def _block_means(values: ArrayLike, blocks: pd.DataFrame) -> list[float]:
    """The mean of a value over the runs of each block, the rows of `blocks`; NaN where one of them has none."""
    values, names = np.asarray(values), [tuple(block) for block in blocks.itertuples(index=False)]
    return [values[[name == block for name in names]].mean() for block in dict.fromkeys(names)]


def retention_by_stage(records: Records) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each stage of each run left of base knowledge and of the perplexity on known text, beside stage 0 of the same run.

    The second table has base knowledge by probe. Perplexity is per token. `lost` to `gained_corrected` are means over probes (`metrics.Retention`).
    """
    scores, runs = records.scores, records.runs[["run", "seed", *NAMED, "stream_hash"]]
    stages = scores.drop_duplicates(["run", "stage"], keep="last")[["run", "stage", "stage_name"]].merge(runs, on="run")
    table = stages.sort_values([*NAMED, "seed", "run", "stage"], ignore_index=True)
    for metric in ("nll_token", "bits_per_byte"):
        means = _over_texts(scores, metric)
        untouched = means[means.index.get_level_values("stage") == 0].droplevel("stage")
        table = table.join(means.rename(metric), on=["run", "stage"]).join(untouched.rename(f"{metric}_0"), on="run")
    table = table.assign(
        perplexity=metrics.perplexity_ratio(0.0, table["nll_token"], count=1),
        perplexity_ratio=metrics.perplexity_ratio(table["nll_token_0"], table["nll_token"], count=1),
        bits_per_byte_drift=table["bits_per_byte"] - table["bits_per_byte_0"],
    )
    of_stages, of_probes = [], []
    for row, (accuracy, probability) in zip(table.to_dict("records"), _knowledge(records, table), strict=True):
        bounded = {f"retention_probability{end}": vars(probability)[f"retention{end}"] for end in ("", "_low", "_high")}
        reason = "; ".join(filter(None, [accuracy.reason, probability.reason]))
        of_stages.append(row | vars(accuracy) | bounded | {"reason": reason})
        twins = {one.task: one.retention for one in probability.probes}
        of_probes += [row | vars(one) | {"retention_probability": twins.get(one.task, nan)} for one in accuracy.probes]
    retention = pd.DataFrame(of_stages, columns=columns_of("retention.csv"))
    return retention, pd.DataFrame(of_probes, columns=columns_of("probes.csv"))


def _knowledge(records: Records, stages: pd.DataFrame) -> Iterator[tuple[metrics.Retention, metrics.Retention]]:
    """Retention over the base-knowledge tasks, by accuracy and by probability, after each stage of each run, in the order of `stages`."""
    cells, of = knowledge_tasks(records.scores), f"{KNOWLEDGE_PROBE}|"
    for run, own in stages.groupby("run", sort=False):
        tasks, first = cells[cells["run"] == run].set_index("task"), records.outcomes(run, stage=0, of=of)
        twins = tasks.assign(metric=PROBABILITY, floor=tasks["chance"])
        for stage in own["stage"]:
            later = records.outcomes(run, stage=stage, of=of)
            accuracy, probability = (_kept(asked, first, later=later, stage=stage) for asked in (tasks, twins))
            # Records that are older than probabilities have none of them, for which there is nothing to say.
            yield accuracy, probability if probability.probes else metrics.Retention(reason="")


def _kept(tasks: pd.DataFrame, first: Outcomes, *, later: Outcomes, stage: int) -> metrics.Retention:
    """Retention after `stage` over the `tasks` (by name: their metric, floor and chance) that have outcomes at stage 0."""
    keys = {task: f"{KNOWLEDGE_PROBE}|{task}|{metric}" for task, metric in tasks["metric"].items()}
    # Else a group's total, or text that is scored otherwise: no item is right or wrong.
    before = {task: first[key] for task, key in keys.items() if key in first}
    after = {task: later.get(keys[task], ()) for task in before}
    changed = [task for task in before if len(after[task]) != len(before[task])]
    unrated = [task for task in before if isnan(tasks["chance"][task])]
    if not before:
        return metrics.Retention(reason=f"no per-item outcomes of the {KNOWLEDGE_PROBE} probe at stage 0")
    if changed:
        return metrics.Retention(reason=f"{changed[0]}: stage {stage} did not measure the items of stage 0")
    if unrated:
        return metrics.Retention(reason=f"{unrated[0]}: no chance rate at stage 0")
    return metrics.retention(before, after=after, floor=tasks["floor"], chance=tasks["chance"])


def _over_texts(scores: pd.DataFrame, metric: str) -> pd.Series:
    """Mean over a run's perplexity texts of `metric`, by run and stage; NaN where a stage did not measure all of them."""
    texts = scores[(scores["probe"] == PERPLEXITY_PROBE) & (scores["metric"] == metric)]
    measured = texts.groupby(["run", "stage"])["value"]
    return measured.agg(_mean).where(measured.size().ge(texts.groupby("run")["task"].nunique(), level="run"))


def score_matrices(scores: pd.DataFrame, runs: pd.DataFrame) -> Iterator[tuple[str, metrics.Floats]]:
    """Each task's primary score after each stage, (stages + 1, tasks), by run; NaN where it was not measured."""
    own, last = scores[scores["probe"] == MATRIX_PROBE], scores.groupby("run")["stage"].max()
    cells = own.pivot(index=["run", "stage"], columns=["task", "metric"], values="value")
    for run, tasks, primary in runs[["tasks", "metrics"]].itertuples():
        rows = [(run, stage) for stage in range(last.get(run, 0) + 1)]
        yield run, cells.reindex(index=rows, columns=[(task, primary[task]) for task in tasks]).to_numpy(np.float64)


def _measures(records: Records, runs: pd.DataFrame, retention: pd.DataFrame, matrices: Matrices) -> pd.DataFrame:
    """What each of `runs` amounts to: the measures of leaderboard.csv; costs are of all its stages."""
    scores, measures = records.scores, pd.DataFrame(index=runs.index)

    def by_run(stage: int | pd.Series, probe: str, metric: str) -> Any:
        asked = (scores["stage"] == stage) & (scores["probe"] == probe) & (scores["metric"] == metric)
        return scores[asked].groupby("run")["value"]

    for measure in (metrics.average_accuracy, metrics.learning_accuracy, metrics.bwt, metrics.forgetting, metrics.fwt):
        measures[measure.__name__] = [measure(matrix) for matrix in matrices.values()]
    end = retention.drop_duplicates("run", keep="last").set_index("run")
    measures = measures.join(
        end[["retention", "retention_probability", "retention_min", "perplexity_ratio", "bits_per_byte_drift"]]
    )
    last = scores["run"].map(runs["stages"])
    measures["kl_to_base"] = by_run(last, DIVERGENCE_PROBE, "kl_token").agg(_mean)
    measures["update_norm"] = by_run(last, UPDATE_PROBE, "relative_norm").agg(_mean)
    for metric in ("format_validity", "format_loss"):
        measures[metric] = by_run(last, MATRIX_PROBE, metric).agg(_mean)
    measures["base_accuracy"] = [matrix[0].mean() for matrix in matrices.values()]
    for rate in FLOORS:  # a task without one counts as 0, as its answers are free
        measures[f"{rate}_accuracy"] = by_run(0, MATRIX_PROBE, rate).agg(sum) / runs["tasks"].map(len)
    return measures.join(records.costs.groupby("run").agg(COSTS))


def _leaderboard(runs: pd.DataFrame, measures: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for _, same_method in runs.groupby([*SETTING, "method"]):
        variants = same_method.drop_duplicates("variant")
        for variant, own in same_method.groupby("variant"):
            row = _called(own)
            row["order_sensitivity"] = _order_sensitivity(measures.loc[own.index, "average_accuracy"], own[BLOCK])
            for name, values in measures.loc[own.index].items():
                row[name], row[f"{name}_low"], row[f"{name}_high"] = over_blocks(values, own[BLOCK])
            label = row["method"] if len(variants) == 1 else f"{row['method']} [{variant}]"
            rows.append(row | {"notes": _notes(own, row, variants), "label": label, "runs": list(own.index)})
    order = [*SETTING, "average_accuracy", "method", "variant"]
    is_rising = [name != "average_accuracy" for name in order]
    return pd.DataFrame(rows, columns=ROW).sort_values(order, ascending=is_rising, ignore_index=True)


def _diverged(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for the runs that diverged of each setting, method and variant: where they did, and nothing else."""
    rows = []
    for _, own in runs.groupby([*SETTING, "method", "variant"]):
        row, ends = _called(own), [f"order {one.order}, seed {one.seed}: {one.problem}" for one in own.itertuples()]
        label, notes = f"{row['method']} (diverged)", f"diverged, not ranked ({'; '.join(ends)})"
        rows.append(row | {"notes": notes, "label": label, "runs": []})
    return pd.DataFrame(rows, columns=ROW)


def _called(runs: pd.DataFrame) -> dict[str, Any]:
    """What the runs of one row have in common, and how many orders, seeds and blocks they are of."""
    row = runs.iloc[0][[*SETTING, "method", "variant"]].to_dict()
    counts = {f"n_{name}s": runs[name].nunique() for name in BLOCK}
    return row | counts | {"n_blocks": len(runs.drop_duplicates(BLOCK))}


def _order_sensitivity(values: pd.Series, blocks: pd.DataFrame) -> float:
    """Highest less lowest mean of an order, in the unit of `values`, one a run; NaN of one order (after OPD, Yoon et al. 2020, arXiv 1902.09432)."""
    of_order = [_block_means(values[own.index], own) for _, own in blocks.groupby("order")]
    return float(np.ptp([np.mean(means) for means in of_order])) if len(of_order) > 1 else nan


def _notes(runs: pd.DataFrame, row: Mapping[str, Any], variants: pd.DataFrame) -> str:
    """What a reader must know before trusting a row. `variants`: one run of each variant of its method."""
    first, n_blocks, n_commits = runs.iloc[0], row["n_blocks"], runs["commit"].nunique()
    trained = sorted({probe for probes in runs["trained_probes"] for probe in probes})
    fewest, is_shared = differences.FEWEST_BLOCKS, 1 < row["n_orders"] < n_blocks
    own, *others = map(identity, [first["config"], *variants["config"]])
    differ = {key for other in others for key in {*own, *other} if other.get(key) != own.get(key)}
    keys = sorted(differ.difference(BLOCK_KEYS))
    values = ", ".join(f"{key}={'null' if own.get(key) is None else own[key]}" for key in keys)
    dropped = sum(one["count"] for one in first["unusable"] if one["dropped"])
    said = {
        f"n_blocks<{fewest}: no claim of difference": n_blocks < fewest,
        f"{row['n_orders']} orders in {n_blocks} blocks: differences are claimed too often": is_shared
        and n_blocks >= fewest,
        f"{len(runs)} runs of {n_blocks} blocks": len(runs) > n_blocks,
        "dirty commit": runs["dirty"].any(),
        f"{n_commits} commits": n_commits > 1,
        "data differs between blocks": any(data != first["data"] for data in runs["data"]),
        "model_fingerprint differs between blocks": runs["model_fingerprint"].nunique() > 1,
        f"rows dropped: {dropped}": dropped,
        f"probe trained on: {', '.join(trained)}": trained,
        "below base": row["average_accuracy"] < row["base_accuracy"],
        "trained nothing": row["tokens_trained"] == 0,
        f"stages {first['stages']}, tasks {len(first['tasks'])}": (runs["stages"] != runs["tasks"].map(len)).any(),
        "retention undefined: see retention.csv": isnan(row["retention"]),
        f"variant: {values}": keys,
    }
    return "; ".join(note for note, holds in said.items() if holds)


def _mean(values: Iterable[float]) -> float:
    """Mean, NaN of nothing and where a value is NaN."""
    return float(np.mean(list(values) or np.nan))

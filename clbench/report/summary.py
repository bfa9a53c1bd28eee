"""What runs amount to: one row per run and stage, one score matrix per run, one row per line of the leaderboard.

Applies the formulas of metrics to the records of runs. Not here: the files made of the result (tables, html).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from clbench.config import SEEDS, identity
from clbench.record.runs import Records
from clbench.report import metrics

MATRIX_PROBE, KNOWLEDGE_PROBE, PERPLEXITY_PROBE, DIVERGENCE_PROBE = "stream", "knowledge", "perplexity", "divergence"
ITEM_METRICS = ["acc_norm", "acc", "exact_match,flexible-extract", "exact_match"]
"""What an item of a base-knowledge task is scored by: the first of these that the task has."""

SETTING = ["stream", "order", "model", "stream_hash"]
"""What a method is compared on: the stream, its order, the model and the hash of the stream's data."""
NAMED = ["stream", "order", "model", "method"]
SUMS = ["seconds_train", "seconds_probe", "seconds_other", "tokens_trained", "tokens_replayed"]
COSTS = {**dict.fromkeys(SUMS, "sum"), "trainable_parameters": "max", "peak_memory_bytes": "max", "flops": "sum"}
"""How the costs of a run's stages make that of the run."""

Matrices = Mapping[str, metrics.Floats]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the runs of a results directory amount to; scores are fractions of 1, NaN where a number does not exist.

    `retention`: one row per run and stage, the columns of retention.csv. `matrices`: by the name of a ranked run, each task's primary score after
    each stage, (stages + 1, tasks). `leaderboard`: the ranked runs by setting, method and variant, best average accuracy first within a setting:
    the columns of leaderboard.csv, `label` (the method's name, with the variant where it has several) and `runs` (their names).
    """

    records: Records
    retention: pd.DataFrame
    matrices: Matrices
    leaderboard: pd.DataFrame


def summarise(records: Records) -> Summary:
    """Works everything out, once."""
    runs, retention = records.runs, _retention(records)
    ranked = runs[(runs["state"] == "complete") & (runs["problem"] == "")].set_index("run")
    matrices = dict(_matrices(records.scores, ranked))
    ranked = ranked.assign(stages=[len(matrix) - 1 for matrix in matrices.values()])
    leaderboard = _leaderboard(ranked, _measures(records, ranked, retention, matrices))
    return Summary(records=records, retention=retention, matrices=matrices, leaderboard=leaderboard)


def marks(rows: pd.DataFrame, measure: str) -> dict[str, str]:
    """By label, "best" for the row of one setting with the highest `measure`, "tied" for those that cannot be told from it.

    A row cannot be told from the best where the two 95 % intervals overlap or one has no interval (a single seed).
    Rows that trained nothing are references and do not compete.
    """
    rivals = rows[(rows["tokens_trained"] != 0) & rows[measure].notna()]
    best = rivals.sort_values(measure, ascending=False, kind="stable")[:1]
    apart = rivals[f"{measure}_high"] < best[f"{measure}_low"].max()  # False with NaN
    return dict.fromkeys(rivals["label"][~apart], "tied") | dict.fromkeys(best["label"], "best")


def over_seeds(values: ArrayLike, seeds: ArrayLike) -> tuple[float, float, float]:
    """Mean over seeds of one value a run, and the bounds of its 95 % interval; a seed that was run twice is one replicate."""
    values, seeds = np.asarray(values), np.asarray(seeds)
    return metrics.interval([values[seeds == seed].mean() for seed in dict.fromkeys(seeds)])


def _retention(records: Records) -> pd.DataFrame:
    """What each stage of each run left of base knowledge and of the perplexity on known text, beside stage 0 of the same run.

    Perplexity is per token. `lost` and `gained` are means over probes of the share of items that turned wrong and right.
    """
    scores, runs = records.scores, records.runs[["run", "seed", "method", *SETTING]]
    stages = scores.drop_duplicates(["run", "stage"], keep="last")[["run", "stage", "stage_name"]].merge(runs, on="run")
    table = stages.sort_values([*NAMED, "seed", "run", "stage"], ignore_index=True)
    for metric in ("nll_token", "bits_per_byte"):
        means = _over_texts(scores, metric)
        untouched = means[means.index.get_level_values("stage") == 0].droplevel("stage")
        table = table.join(means.rename(metric), on=["run", "stage"]).join(untouched.rename(f"{metric}_0"), on="run")
    kept = list(_knowledge(records, table))
    return table[[*NAMED, "seed", "stage", "stage_name"]].assign(
        retention=[one.retention for one in kept],
        retention_low=[one.low for one in kept],
        retention_high=[one.high for one in kept],
        retention_min=[one.minimum for one in kept],
        retention_min_probe=[one.minimum_probe for one in kept],
        lost=[one.lost for one in kept],
        gained=[one.gained for one in kept],
        perplexity=metrics.perplexity_ratio(0.0, table["nll_token"], count=1),
        perplexity_ratio=metrics.perplexity_ratio(table["nll_token_0"], table["nll_token"], count=1),
        bits_per_byte=table["bits_per_byte"],
        bits_per_byte_drift=table["bits_per_byte"] - table["bits_per_byte_0"],
        reason=[one.reason for one in kept],
        **table[["stream_hash", "run"]],
    )


def _knowledge(records: Records, stages: pd.DataFrame) -> Iterator[metrics.Retention]:
    """Retention over the base-knowledge tasks after each stage of each run, in the order of `stages`."""
    scores = records.scores
    measured = scores[(scores["stage"] == 0) & (scores["probe"] == KNOWLEDGE_PROBE)]
    cells = measured.pivot(index=["run", "task"], columns="metric", values="value")
    cells["items"] = cells.reindex(columns=ITEM_METRICS).notna().idxmax(axis=1)
    cells = cells.reindex(columns=["items", "chance"]).reset_index()
    for run, own in stages.groupby("run", sort=False):
        tasks, first = cells[cells["run"] == run].set_index("task"), records.outcomes(run, stage=0)
        keys = {task: f"{KNOWLEDGE_PROBE}|{task}|{metric}" for task, metric in tasks["items"].items()}
        # Else a group's total, or text that is scored otherwise: no item is right or wrong.
        before = {task: first[key] for task, key in keys.items() if key in first}
        for stage in own["stage"]:
            later = records.outcomes(run, stage=stage)
            after = {task: later.get(keys[task], ()) for task in before}
            changed = [task for task in before if len(after[task]) != len(before[task])]
            unrated = [task for task in before if isnan(tasks["chance"][task])]
            if not before:
                yield metrics.Retention(reason=f"no per-item outcomes of the {KNOWLEDGE_PROBE} probe at stage 0")
            elif changed:
                yield metrics.Retention(reason=f"{changed[0]}: stage {stage} did not measure the items of stage 0")
            elif unrated:
                yield metrics.Retention(reason=f"{unrated[0]}: no chance rate at stage 0")
            else:
                yield metrics.retention(before, after=after, chance=tasks["chance"])


def _over_texts(scores: pd.DataFrame, metric: str) -> pd.Series:
    """Mean over a run's perplexity texts of `metric`, by run and stage; NaN where a stage did not measure all of them."""
    texts = scores[(scores["probe"] == PERPLEXITY_PROBE) & (scores["metric"] == metric)]
    measured = texts.groupby(["run", "stage"])["value"]
    return measured.agg(_mean).where(measured.size().ge(texts.groupby("run")["task"].nunique(), level="run"))


def _matrices(scores: pd.DataFrame, runs: pd.DataFrame) -> Iterator[tuple[str, metrics.Floats]]:
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
    measures = measures.join(end[["retention", "retention_min", "perplexity_ratio", "bits_per_byte_drift"]])
    last = scores["run"].map(runs["stages"])
    measures["kl_to_base"] = by_run(last, DIVERGENCE_PROBE, "kl_token").agg(_mean)
    for metric in ("format_validity", "format_loss"):
        measures[metric] = by_run(last, MATRIX_PROBE, metric).agg(_mean)
    measures["base_accuracy"] = [matrix[0].mean() for matrix in matrices.values()]
    # A task without one counts as 0, as its answers are free.
    for rate in ("chance", "majority", "format_only", "copy"):
        measures[f"{rate}_accuracy"] = by_run(0, MATRIX_PROBE, rate).agg(sum) / runs["tasks"].map(len)
    return measures.join(records.costs.groupby("run").agg(COSTS))


def _leaderboard(runs: pd.DataFrame, measures: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for _, same_method in runs.groupby([*SETTING, "method"]):
        variants = same_method.drop_duplicates("variant")
        for variant, own in same_method.groupby("variant"):
            row = own.iloc[0][[*SETTING, "method", "variant"]].to_dict() | {"n_seeds": own["seed"].nunique()}
            for name, values in measures.loc[own.index].items():
                row[name], row[f"{name}_low"], row[f"{name}_high"] = over_seeds(values, own["seed"])
            label = row["method"] if len(variants) == 1 else f"{row['method']} [{variant}]"
            rows.append(row | {"notes": _notes(own, row, variants), "label": label, "runs": list(own.index)})
    bounds = [f"{name}{bound}" for name in measures for bound in ("", "_low", "_high")]
    board = pd.DataFrame(rows, columns=[*NAMED, "variant", "n_seeds", *bounds, "stream_hash", "notes", "label", "runs"])
    order = dict.fromkeys([*SETTING, "average_accuracy", "method", "variant"], True) | {"average_accuracy": False}
    return board.sort_values(list(order), ascending=list(order.values()), ignore_index=True)


def _notes(runs: pd.DataFrame, row: Mapping[str, Any], variants: pd.DataFrame) -> str:
    """What a reader must know before trusting a row. `variants`: one run of each variant of its method."""
    first, n_seeds, n_commits = runs.iloc[0], row["n_seeds"], runs["commit"].nunique()
    trained = sorted({probe for probes in runs["trained_probes"] for probe in probes})
    own, *others = map(identity, [first["config"], *variants["config"]])
    keys = sorted({key for other in others for key in other}.difference(SEEDS))
    keys = [key for key in keys if any(other.get(key) != own.get(key) for other in others)]
    dropped = sum(one["count"] for one in first["unusable"] if one["dropped"])
    said = {
        "n_seeds<3: no interval": n_seeds == 1,
        "n_seeds<3: wide interval": n_seeds == 2,
        f"{len(runs)} runs of {n_seeds} seeds": len(runs) > n_seeds,
        "dirty commit": runs["dirty"].any(),
        f"{n_commits} commits": n_commits > 1,
        "data differs between seeds": any(data != first["data"] for data in runs["data"]),
        "model_fingerprint differs between seeds": runs["model_fingerprint"].nunique() > 1,
        f"rows dropped: {dropped}": dropped,
        f"probe trained on: {', '.join(trained)}": trained,
        "below base": row["average_accuracy"] < row["base_accuracy"],
        "trained nothing": row["tokens_trained"] == 0,
        f"stages {first['stages']}, tasks {len(first['tasks'])}": (runs["stages"] != runs["tasks"].map(len)).any(),
        "retention undefined: see retention.csv": isnan(row["retention"]),
        f"variant: {', '.join(f'{key}={own.get(key)}' for key in keys)}": keys,
    }
    return "; ".join(note for note, holds in said.items() if holds)


def _mean(values: Iterable[float]) -> float:
    """Mean, NaN of nothing and where a value is NaN."""
    return float(np.mean(list(values) or np.nan))

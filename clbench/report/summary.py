"""What runs amount to: one record per run and stage, per run, and per row of the leaderboard.

Applies the formulas of metrics to the records of runs. Not here: the files made of the result (leaderboard, report).

>>> [(row.method, round(row.mean.retention, 2)) for row in entries(read_runs(Path("results")))]
[('alpha', 0.96), ('beta', 0.82)]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import isnan, nan
from typing import Any

import numpy as np

from clbench.config import SEEDS, identity
from clbench.record.runs import MATRIX_PROBE, Run, Setting
from clbench.report import metrics

KNOWLEDGE_PROBE, PERPLEXITY_PROBE, DIVERGENCE_PROBE = "knowledge", "perplexity", "divergence"
ITEM_METRICS = ("acc_norm", "acc", "exact_match,flexible-extract", "exact_match")
"""What an item of a base-knowledge task is scored by: the first of these that the task has."""


@dataclass(frozen=True, kw_only=True)
class StageRetention:
    """What one stage left of the untouched model: fractions of 1, perplexity per token, bits per byte; NaN if unknown.

    `lost` and `gained` are means over probes of the share of items that turned wrong and right since stage 0.
    """

    retention: float
    retention_low: float
    retention_high: float
    retention_min: float
    retention_min_probe: str
    lost: float
    gained: float
    perplexity: float
    perplexity_ratio: float
    bits_per_byte: float
    bits_per_byte_drift: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What one run amounts to. Scores as fractions of 1; costs are totals over stages, parameters and memory maxima.

    `kl_to_base` is in nats per token. `format_loss` is what closed tasks lose when the model writes its answer instead of choosing it.
    """

    average_accuracy: float
    learning_accuracy: float
    bwt: float
    forgetting: float
    fwt: float
    retention: float
    retention_min: float
    perplexity_ratio: float
    bits_per_byte_drift: float
    kl_to_base: float
    format_validity: float
    format_loss: float
    base_accuracy: float
    chance_accuracy: float
    majority_accuracy: float
    format_only_accuracy: float
    seconds_train: float
    seconds_probe: float
    seconds_other: float
    tokens_trained: float
    tokens_replayed: float
    trainable_parameters: float
    peak_memory_bytes: float
    flops: float


MEASURES = tuple(field.name for field in fields(Summary))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the leaderboard: the seeds of one variant of one method in one setting, with 95 % intervals.

    `label` is the method's name, with the variant where the method has several.
    """

    setting: Setting
    method: str
    variant: str
    runs: tuple[Run, ...]
    n_seeds: int
    mean: Summary
    low: Summary
    high: Summary
    notes: tuple[str, ...]
    label: str


def stage_retention(run: Run, *, stage: int) -> StageRetention:
    """What `stage` left of base knowledge and of the perplexity on known text, paired with stage 0 of the same run."""
    record, missing = _knowledge(run, stage=stage)
    nll_before, nll_after = _paired(run, metric="nll_token", stage=stage)
    bits_before, bits_after = _paired(run, metric="bits_per_byte", stage=stage)
    probes = record.probes if record else ()
    return StageRetention(
        retention=record.retention if record else nan,
        retention_low=record.low if record else nan,
        retention_high=record.high if record else nan,
        retention_min=record.minimum if record else nan,
        retention_min_probe=record.minimum_probe if record else "",
        lost=_mean([probe.lost for probe in probes]),
        gained=_mean([probe.gained for probe in probes]),
        perplexity=metrics.perplexity_ratio(0.0, nll_after, count=1),
        perplexity_ratio=metrics.perplexity_ratio(nll_before, nll_after, count=1),
        bits_per_byte=bits_after,
        bits_per_byte_drift=bits_after - bits_before,
        reason=record.reason if record else missing,
    )


def summarise(run: Run) -> Summary:
    """What a finished run amounts to."""
    matrix, kept = run.matrix, stage_retention(run, stage=run.last_stage)
    return Summary(
        average_accuracy=metrics.average_accuracy(matrix),
        learning_accuracy=metrics.learning_accuracy(matrix),
        bwt=metrics.bwt(matrix),
        forgetting=metrics.forgetting(matrix),
        fwt=metrics.fwt(matrix),
        retention=kept.retention,
        retention_min=kept.retention_min,
        perplexity_ratio=kept.perplexity_ratio,
        bits_per_byte_drift=kept.bits_per_byte_drift,
        kl_to_base=_mean(_divergences(run, stage=run.last_stage)),
        format_validity=_mean(_stream_values(run, metric="format_validity", stage=run.last_stage)),
        format_loss=_mean(_stream_values(run, metric="format_loss", stage=run.last_stage)),
        base_accuracy=float(matrix[0].mean()),
        chance_accuracy=_rate(run, metric="chance"),
        majority_accuracy=_rate(run, metric="majority"),
        format_only_accuracy=_rate(run, metric="format_only"),
        seconds_train=_total(run, "seconds_train"),
        seconds_probe=_total(run, "seconds_probe"),
        seconds_other=_total(run, "seconds_other"),
        tokens_trained=_total(run, "tokens_trained"),
        tokens_replayed=_total(run, "tokens_replayed"),
        trainable_parameters=max((cost.trainable_parameters for cost in run.costs), default=nan),
        peak_memory_bytes=max((cost.peak_memory_bytes for cost in run.costs), default=nan),
        flops=_total(run, "flops"),
    )


def entries(runs: Sequence[Run]) -> tuple[Entry, ...]:
    """The leaderboard of those of `runs` that are complete and fit to be ranked: best average accuracy first within a setting."""
    groups: dict[tuple[Setting, str, str], list[Run]] = {}
    for run in runs:
        if run.state == "complete" and not run.unfit:
            groups.setdefault((run.setting, run.method, run.variant), []).append(run)
    by_method: dict[tuple[Setting, str], list[Run]] = {}
    for (setting, method, _), members in groups.items():
        by_method.setdefault((setting, method), []).append(members[0])
    found = [_entry(members, siblings=by_method[key[:2]]) for key, members in groups.items()]
    return tuple(sorted(found, key=_rank))


def tied_with_best(rows: Sequence[Entry], *, measure: str) -> tuple[str | None, frozenset[str]]:
    """The label of the row of one setting with the highest `measure`, and of those that cannot be told from it.

    A row cannot be told from the best where the two 95 % intervals overlap or one has no interval (a single seed).
    Rows that trained nothing are references and do not compete.
    """
    rivals = [row for row in rows if row.mean.tokens_trained != 0 and not isnan(vars(row.mean)[measure])]
    if not rivals:
        return None, frozenset()
    best = max(rivals, key=lambda row: vars(row.mean)[measure])
    apart = [row for row in rivals if vars(row.high)[measure] < vars(best.low)[measure]]  # False with NaN
    return best.label, frozenset(row.label for row in rivals if row is not best and row not in apart)


def _rank(entry: Entry) -> tuple[Any, ...]:
    """Sort key: setting, then average accuracy downwards (unknown last), then name."""
    accuracy = entry.mean.average_accuracy
    return entry.setting, isnan(accuracy), 0.0 if isnan(accuracy) else -accuracy, entry.method, entry.variant


def _entry(runs: Sequence[Run], *, siblings: Sequence[Run]) -> Entry:
    """The seeds of one variant as one row. `siblings`: one run of each variant of the method, this one included."""
    by_seed: dict[int, list[Summary]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(summarise(run))
    # A seed that was run twice is one replicate: its runs are averaged before seeds are.
    bounds = {
        name: metrics.interval([_mean([vars(one)[name] for one in repeats]) for repeats in by_seed.values()])
        for name in MEASURES
    }
    mean, low, high = (Summary(**{name: bound[which] for name, bound in bounds.items()}) for which in range(3))
    return Entry(
        setting=runs[0].setting,
        method=runs[0].method,
        variant=runs[0].variant,
        runs=tuple(runs),
        n_seeds=len(by_seed),
        mean=mean,
        low=low,
        high=high,
        label=runs[0].method if len(siblings) == 1 else f"{runs[0].method} [{runs[0].variant}]",
        notes=tuple(_notes(runs, mean=mean, n_seeds=len(by_seed), siblings=siblings)),
    )


def _notes(runs: Sequence[Run], *, mean: Summary, n_seeds: int, siblings: Sequence[Run]) -> Iterator[str]:
    """What a reader must know before trusting a row."""
    if n_seeds < 3:
        yield "n_seeds<3: no interval" if n_seeds == 1 else "n_seeds<3: wide interval"
    if len(runs) > n_seeds:
        yield f"{len(runs)} runs of {n_seeds} seeds"
    if any(run.is_dirty for run in runs):
        yield "dirty commit"
    if len(commits := {run.commit for run in runs}) > 1:
        yield f"{len(commits)} commits"
    for part in ("data", "model_fingerprint"):
        if any(run.manifest.get(part) != runs[0].manifest.get(part) for run in runs):
            yield f"{part} differs between seeds"
    if trained := sorted({probe for run in runs for probe in run.manifest.get("trained_probes", [])}):
        yield f"probe trained on: {', '.join(trained)}"
    if mean.average_accuracy < mean.base_accuracy:
        yield "below base"
    if mean.tokens_trained == 0:
        yield "trained nothing"
    if any(run.last_stage != len(run.manifest["tasks"]) for run in runs):
        yield f"stages {runs[0].last_stage}, tasks {len(runs[0].manifest['tasks'])}"
    if isnan(mean.retention):
        yield "retention undefined: see retention.csv"
    if len(siblings) > 1:
        own, *others = (identity(run.manifest["config"]) for run in (runs[0], *siblings))
        keys = sorted({key for other in others for key in other})
        differing = [
            key for key in keys if key not in SEEDS and any(other.get(key) != own.get(key) for other in others)
        ]
        yield "variant: " + ", ".join(f"{key}={own.get(key)}" for key in differing)


def _knowledge(run: Run, *, stage: int) -> tuple[metrics.Retention | None, str]:
    """Retention over the base-knowledge tasks, or None and why there is none."""
    first, later = run.items(0), run.items(stage)
    before: dict[str, metrics.Floats] = {}
    after: dict[str, metrics.Floats] = {}
    chance: dict[str, float] = {}
    for task in sorted({task for row, probe, task, _ in run.values if (row, probe) == (0, KNOWLEDGE_PROBE)}):
        metric = next((m for m in ITEM_METRICS if (0, KNOWLEDGE_PROBE, task, m) in run.values), "")
        key = f"{KNOWLEDGE_PROBE}|{task}|{metric}"
        if not metric or key not in first:
            continue  # a group's total, or text that is scored otherwise: no item is right or wrong
        if key not in later or len(first[key]) != len(later[key]):
            return None, f"{task}: stage {stage} did not measure the items of stage 0"
        rate = run.values.get((0, KNOWLEDGE_PROBE, task, "chance"), nan)
        if isnan(rate):
            return None, f"{task}: no chance rate at stage 0"
        before[task], after[task], chance[task] = first[key], later[key], rate
    if not before:
        return None, f"no per-item outcomes of the {KNOWLEDGE_PROBE} probe at stage 0"
    return metrics.retention(before, after=after, chance=chance), ""


def _paired(run: Run, *, metric: str, stage: int) -> tuple[float, float]:
    """Mean over perplexity tasks of `metric` at stage 0 and at `stage`, in its unit; NaN unless both measured all."""
    tasks = {t for row, probe, t, m in run.values if probe == PERPLEXITY_PROBE and m == metric and row in (0, stage)}
    rows = [
        [run.values.get((row, PERPLEXITY_PROBE, task, metric), nan) for task in sorted(tasks)] for row in (0, stage)
    ]
    return _mean(rows[0]), _mean(rows[1])


def _stream_values(run: Run, *, metric: str, stage: int) -> list[float]:
    """`metric` of each task of the stream that reports it after `stage`, in the unit of the scores."""
    keys = [(stage, MATRIX_PROBE, task, metric) for task in run.manifest["tasks"]]
    return [run.values[key] for key in keys if key in run.values]


def _divergences(run: Run, *, stage: int) -> list[float]:
    """KL from the untouched model after `stage`, in nats per token, of each text."""
    wanted = (stage, DIVERGENCE_PROBE, "kl_token")
    return [value for (row, probe, _, metric), value in run.values.items() if (row, probe, metric) == wanted]


def _rate(run: Run, *, metric: str) -> float:
    """Mean over tasks of a rate of the data (chance, majority): 0 for a task without one, as its answers are free."""
    rates = _stream_values(run, metric=metric, stage=0)
    return sum(rates) / len(run.manifest["tasks"]) if rates else nan


def _total(run: Run, name: str) -> float:
    """Sum over stages of a field of Cost, in its unit; NaN where no cost was recorded."""
    return sum(vars(cost)[name] for cost in run.costs) if run.costs else nan


def _mean(values: Sequence[float]) -> float:
    """Mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else nan

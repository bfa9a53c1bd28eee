"""What the scores of a run mean: accuracy over a stream, retention of base knowledge, drift of perplexity, intervals.

Pure functions of numpy arrays. Not here: how a score is measured (probes) or where it is stored (ledger).
A score matrix has shape (stages + 1, tasks): row 0 is the untouched model, row i the model after stage i; stage j + 1
trains on column j. A quantity that does not exist (backward transfer of one task) is NaN, never 0.

>>> round(bwt([[0.0, 0.0], [0.9, 0.1], [0.6, 0.8]]), 3)
-0.3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]

# The item bootstrap always draws the same numbers, so that equal outcomes give equal intervals, on every call.
BOOTSTRAP_SEED = 16
BOOTSTRAP_DRAWS = 2000


def average_accuracy(scores: ArrayLike) -> float:
    """Mean score over all tasks after the last stage, in the unit of the scores. `scores`: (stages + 1, tasks)."""
    return float(np.mean(_matrix(scores)[-1]))


def accuracy_so_far(scores: ArrayLike) -> Floats:
    """Mean score over the tasks trained so far, after each stage: (stages,). NaN where stages are not tasks."""
    matrix = _matrix(scores)
    if not _is_square(matrix):
        return np.full(len(matrix) - 1, nan)
    return np.array([matrix[stage, :stage].mean() for stage in range(1, len(matrix))])


def learning_accuracy(scores: ArrayLike) -> float:
    """Mean score on each task right after its own stage (plasticity), in the unit of the scores."""
    matrix = _matrix(scores)
    return float(np.mean(np.diagonal(matrix[1:]))) if _is_square(matrix) else nan


def bwt(scores: ArrayLike) -> float:
    """Backward transfer: mean change of a score from its own stage to the end, over the T-1 tasks before the last."""
    matrix = _matrix(scores)
    if not _is_square(matrix) or matrix.shape[1] < 2:
        return nan
    return float(np.mean(matrix[-1, :-1] - np.diagonal(matrix[1:])[:-1]))


def forgetting(scores: ArrayLike) -> float:
    """Mean drop from a task's best score (own stage to last but one) to the end, over the T-1 tasks before the last."""
    matrix = _matrix(scores)
    num_tasks = matrix.shape[1]
    if not _is_square(matrix) or num_tasks < 2:
        return nan
    best_before = np.array([matrix[task + 1 : num_tasks, task].max() for task in range(num_tasks - 1)])
    return float(np.mean(best_before - matrix[-1, :-1]))


def fwt(scores: ArrayLike) -> float:
    """Forward transfer: mean gain over row 0 just before a task's stage, over the T-1 tasks after the first."""
    matrix = _matrix(scores)
    if not _is_square(matrix) or matrix.shape[1] < 2:
        return nan
    return float(np.mean(np.diagonal(matrix)[1:] - matrix[0, 1:]))


@dataclass(frozen=True, kw_only=True)
class ProbeRetention:
    """What one probe says of kept knowledge, as fractions of 1.

    `retention` is (after - chance) / (before - chance): it may be negative or above 1, and is NaN where the untouched
    model is within two standard errors of chance. `delta` is after - before, `stderr_paired` its standard error over
    the same items. `lost` and `gained` are the shares of items that turned wrong and right.
    """

    name: str
    retention: float
    before: float
    after: float
    delta: float
    stderr_paired: float
    lost: float
    gained: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Share of base knowledge kept over all probes: the ratio of the chance-corrected sums, as a fraction of 1.

    `low` and `high` bound it at 95 % (paired item bootstrap within each probe). `minimum` is the worst probe's own
    retention and `minimum_probe` its name. `reason` says why a number is NaN, and is empty where none is.
    """

    retention: float
    low: float
    high: float
    minimum: float
    minimum_probe: str
    probes: tuple[ProbeRetention, ...]
    reason: str


def retention(
    before: Mapping[str, ArrayLike], *, after: Mapping[str, ArrayLike], chance: Mapping[str, float]
) -> Retention:
    """Share of base knowledge kept, as a fraction of 1.

    `before` and `after` map a probe's name to its per-item outcomes in [0, 1], (items,), same items in the same order;
    `chance` maps it to the mean over items of 1 / choices (0 for generated answers).
    """
    pairs = {name: (_items(before[name]), _items(after[name])) for name in before}
    probes = tuple(_probe_retention(name, *pair, chance=chance[name]) for name, pair in pairs.items())
    above_before = sum(probe.before - chance[probe.name] for probe in probes)
    above_after = sum(probe.after - chance[probe.name] for probe in probes)
    stderr = sqrt(sum(items.var() / len(items) for items, _ in pairs.values()))
    reasons = [probe.reason for probe in probes if probe.reason]
    kept = low = high = nan
    if above_before > 2 * stderr:
        kept = float(above_after / above_before)
        low, high = _bootstrap_interval(pairs, chance=chance)
    else:
        reasons.append("all probes: the untouched model is within two standard errors of chance")
    known = [probe for probe in probes if not np.isnan(probe.retention)]
    worst = min(known, key=lambda probe: probe.retention, default=None)
    return Retention(
        retention=kept,
        low=low,
        high=high,
        minimum=worst.retention if worst else nan,
        minimum_probe=worst.name if worst else "",
        probes=probes,
        reason="; ".join(reasons),
    )


def perplexity_ratio(nll_before: float, nll_after: float, *, count: float) -> float:
    """Perplexity after over perplexity before, from total negative log-likelihoods in nats over `count` units."""
    with np.errstate(over="ignore"):
        return float(np.exp((nll_after - nll_before) / count))


def bits_per_byte(nll: float, *, n_bytes: float) -> float:
    """Bits per UTF-8 byte of a text of `n_bytes`, from its total negative log-likelihood in nats."""
    return nll / (n_bytes * log(2))


def interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and the bounds of its Student-t interval, in the unit of `values` (one a seed); NaN bounds of one value."""
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean()) if len(sample) else nan
    if len(sample) < 2 or not np.isfinite(mean):
        return mean, nan, nan
    if np.ptp(sample) == 0:  # the mean of equal floats may differ from them in the last bit
        return float(sample[0]), float(sample[0]), float(sample[0])
    half = float(stdtrit(len(sample) - 1, (1 + level) / 2) * sample.std(ddof=1) / sqrt(len(sample)))
    return mean, mean - half, mean + half


def _matrix(scores: ArrayLike) -> Floats:
    """The score matrix in float64, (stages + 1, tasks)."""
    matrix = np.asarray(scores, dtype=np.float64)
    assert matrix.ndim == 2 and min(matrix.shape) >= 1, matrix.shape
    return matrix


def _is_square(matrix: Floats) -> bool:
    """Whether each stage trained one task, so that "a task's own stage" has a meaning (not so in joint training)."""
    return len(matrix) - 1 == matrix.shape[1]


def _items(outcomes: ArrayLike) -> Floats:
    """Per-item outcomes in float64, (items,)."""
    items = np.asarray(outcomes, dtype=np.float64)
    assert items.ndim == 1 and len(items) > 0, items.shape
    return items


def _probe_retention(name: str, before: Floats, after: Floats, *, chance: float) -> ProbeRetention:
    """One probe's retention, paired over items."""
    assert len(before) == len(after), (name, len(before), len(after))
    stderr = before.std() / sqrt(len(before))
    above = before.mean() - chance
    known = above > 2 * stderr
    reason = (
        f"{name}: the untouched model scores {before.mean():.3f}, "
        f"within two standard errors ({stderr:.3f}) of chance {chance:.3f}"
    )
    return ProbeRetention(
        name=name,
        retention=float((after.mean() - chance) / above) if known else nan,
        before=float(before.mean()),
        after=float(after.mean()),
        delta=float(after.mean() - before.mean()),
        # Of right-or-wrong items this is sqrt((lost + gained) - (gained - lost)^2) / sqrt(n).
        stderr_paired=float((after - before).std() / sqrt(len(before))),
        lost=float(np.mean(after < before)),
        gained=float(np.mean(after > before)),
        reason="" if known else reason,
    )


def _bootstrap_interval(
    pairs: Mapping[str, tuple[Floats, Floats]], *, chance: Mapping[str, float]
) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of the retention ratio when the items of each probe are drawn again, in pairs."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    above_before, above_after = np.zeros(BOOTSTRAP_DRAWS), np.zeros(BOOTSTRAP_DRAWS)
    for name, pair in pairs.items():
        # Drawing items with replacement is drawing how often each distinct (before, after) outcome occurs: four numbers
        # a draw for right-or-wrong items, however many there are.
        outcomes, counts = np.unique(np.stack(pair, axis=1), axis=0, return_counts=True)
        shares = generator.multinomial(counts.sum(), counts / counts.sum(), size=BOOTSTRAP_DRAWS) / counts.sum()
        above_before += shares @ outcomes[:, 0] - chance[name]
        above_after += shares @ outcomes[:, 1] - chance[name]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.quantile(above_after / above_before, (0.025, 0.975))
    return float(low), float(high)

"""What the scores of a run mean: accuracy over a stream, retention of base knowledge, drift of perplexity, intervals.

Pure functions of numpy arrays. Not here: how a score is measured (probes) or where it is stored (ledger).
A score matrix has shape (stages + 1, tasks): row 0 is the untouched model, row i the model after stage i; stage j + 1
trains on column j. A quantity that does not exist (backward transfer of one task) is NaN, never 0.

>>> round(bwt([[0.0, 0.0], [0.9, 0.1], [0.6, 0.8]]), 3)
-0.3
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log, nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
Outcomes = Mapping[str, ArrayLike]

# The posterior is always drawn with the same numbers, so that equal outcomes give equal intervals, on every call.
POSTERIOR_SEED = 16
POSTERIOR_DRAWS = 2000
CORNERS = np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
"""The pairs (before, after) of an item that is right or wrong, (2, 4)."""


def average_accuracy(scores: ArrayLike) -> float:
    """Mean score over all tasks after the last stage, in the unit of the scores. `scores`: (stages + 1, tasks)."""
    return float(np.mean(_matrix(scores)[-1]))


def accuracy_so_far(scores: ArrayLike) -> Floats:
    """Mean score over the tasks trained so far, after each stage: (stages,). NaN where stages are not tasks."""
    matrix = _matrix(scores)
    if len(matrix) - 1 != matrix.shape[1]:
        return np.full(len(matrix) - 1, nan)
    return np.array([matrix[stage, :stage].mean() for stage in range(1, len(matrix))])


def learning_accuracy(scores: ArrayLike) -> float:
    """Mean score on each task right after its own stage (plasticity), in the unit of the scores."""
    return float(np.mean(np.diagonal(_task_by_task(scores, at_least=1)[1:])))


def bwt(scores: ArrayLike) -> float:
    """Backward transfer: mean change of a score from its own stage to the end, over the T-1 tasks before the last."""
    matrix = _task_by_task(scores, at_least=2)
    return float(np.mean(matrix[-1, :-1] - np.diagonal(matrix[1:])[:-1]))


def forgetting(scores: ArrayLike) -> float:
    """Mean drop from a task's best score (own stage to last but one) to the end, over the T-1 tasks before the last."""
    matrix = _task_by_task(scores, at_least=2)
    best_before = [matrix[task + 1 : -1, task].max() for task in range(matrix.shape[1] - 1)]
    return float(np.mean(best_before - matrix[-1, :-1]))


def fwt(scores: ArrayLike) -> float:
    """Forward transfer: mean gain over row 0 just before a task's stage, over the T-1 tasks after the first."""
    matrix = _task_by_task(scores, at_least=2)
    return float(np.mean(np.diagonal(matrix)[1:] - matrix[0, 1:]))


@dataclass(frozen=True, kw_only=True)
class ProbeRetention:
    """What one probe's `task` says of kept knowledge, as fractions of 1: columns of probes.csv.

    `retention` is (after - floor) / (before - floor): it may be negative or above 1, and is NaN where the untouched model is within two standard
    errors of `floor` (`reason` says so). `delta` is after - before, `stderr_paired` its standard error over the same items. `lost` and `gained` are
    the shares of items that turned wrong and right, `lost_corrected` and `gained_corrected` what of them guessing does not explain.
    """

    task: str
    floor: float
    retention: float
    before: float
    after: float
    delta: float
    stderr_paired: float
    lost: float
    gained: float
    lost_corrected: float
    gained_corrected: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Share of base knowledge kept over all probes: the ratio of the floor-corrected sums, as a fraction of 1; columns of retention.csv.

    `retention_low` and `retention_high` bound it at 95 % (`_credible_interval`). `retention_min` is the worst probe's own retention and
    `retention_min_probe` its name. `lost` to `gained_corrected` are means over probes. `reason` says why a number is NaN, and is empty where none is.
    """

    retention: float = nan
    retention_low: float = nan
    retention_high: float = nan
    retention_min: float = nan
    retention_min_probe: str = ""
    lost: float = nan
    gained: float = nan
    lost_corrected: float = nan
    gained_corrected: float = nan
    probes: tuple[ProbeRetention, ...] = ()
    reason: str


FLIPS = ("lost", "gained", "lost_corrected", "gained_corrected")


def retention(
    before: Outcomes, *, after: Outcomes, floor: Mapping[str, float], chance: Mapping[str, float]
) -> Retention:
    """Share of base knowledge kept, as a fraction of 1.

    `before` and `after` map a probe's name to its per-item outcomes in [0, 1], (items,), same items in the same order; `floor` maps it to the mean
    outcome that needs no knowledge (guessing, or always the commonest answer), `chance` to the mean over items of 1 / choices (0 for generated
    answers).
    """
    pairs = {task: np.array([before[task], after[task]], dtype=np.float64) for task in before}
    probes = tuple(_probe_retention(task, pair[0], pair[1], floor[task], chance[task]) for task, pair in pairs.items())
    above_before = sum(probe.before - probe.floor for probe in probes)
    above_after = sum(probe.after - probe.floor for probe in probes)
    stderr = sqrt(sum(items.var() / len(items) for items, _ in pairs.values()))
    reasons = [probe.reason for probe in probes if probe.reason]
    kept = low = high = nan
    if above_before > 2 * stderr:
        kept = float(above_after / above_before)
        low, high = _credible_interval(pairs, floor)
    else:
        reasons.append("all probes: the untouched model is within two standard errors of the floor")
    minimum, worst = min(((probe.retention, probe.task) for probe in probes if not probe.reason), default=(nan, ""))
    return Retention(
        retention=kept,
        retention_low=low,
        retention_high=high,
        retention_min=minimum,
        retention_min_probe=worst,
        **{flips: float(np.mean([vars(probe)[flips] for probe in probes])) for flips in FLIPS},
        probes=probes,
        reason="; ".join(reasons),
    )


def beyond_guessing(flipped: float, *, before: float, after: float, chance: float) -> float:
    """Share of items that turned wrong (or right) and would not have by guessing, never below 0 (arXiv 2510.17776).

    `flipped` is the raw share, `before` and `after` are accuracies. Of an item with k = 1 / `chance` choices the part of the wrong answers says how
    often guesses are right: lost by guessing is (1 - before) / (k - 1) * (1 - after), and so is gained by guessing.
    """
    by_guessing = (1 - before) * (1 - after) * chance / (1 - chance) if chance < 1 else 0.0
    return max(0.0, flipped - by_guessing)


def perplexity_ratio(nll_before: ArrayLike, nll_after: ArrayLike, *, count: float) -> Floats:
    """Perplexity after over perplexity before, from total negative log-likelihoods in nats over `count` units."""
    nats = np.asarray((np.asarray(nll_after) - np.asarray(nll_before)) / count, dtype=np.float64)
    return np.array([_exponential(each) for each in nats.flat]).reshape(nats.shape)


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


def paired_interval(first: ArrayLike, second: ArrayLike) -> tuple[float, float]:
    """Bounds at 95 % of the mean of `first` less that of `second`, outcomes in [0, 1] of the same items in the same order, (items,) each.

    They are quantiles of that difference under the posterior of `_credible_interval`. A Student interval is too narrow for a few hundred right or
    wrong answers (arXiv 2503.01747), and has no width where no answer differs.
    """
    means = _posterior(np.array([first, second], dtype=np.float64), np.random.default_rng(POSTERIOR_SEED))
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    return float(low), float(high)


def _exponential(nats: float) -> float:
    """e to the power `nats`, infinite beyond what a float holds; not np.exp, whose last digit depends on the processor."""
    return inf if nats > log(sys.float_info.max) else exp(nats)


def _matrix(scores: ArrayLike) -> Floats:
    """The score matrix in float64, (stages + 1, tasks)."""
    matrix = np.asarray(scores, dtype=np.float64)
    assert matrix.ndim == 2 and min(matrix.shape) >= 1, matrix.shape
    return matrix


def _task_by_task(scores: ArrayLike, *, at_least: int) -> Floats:
    """The score matrix if each stage trained one task (not so in joint training) and there are enough; else NaN, as all that follows."""
    matrix = _matrix(scores)
    return matrix if len(matrix) - 1 == matrix.shape[1] >= at_least else np.full((3, 2), nan)


def _probe_retention(task: str, before: Floats, after: Floats, floor: float, chance: float) -> ProbeRetention:
    score, stderr, above = float(before.mean()), before.std() / sqrt(len(before)), before.mean() - floor
    at_floor = (
        f"the untouched model scores {score:.3f}, within two standard errors ({stderr:.3f}) of the floor {floor:.3f}"
    )
    known, scored = above > 2 * stderr, {"before": score, "after": float(after.mean())}
    lost, gained = float(np.mean(after < before)), float(np.mean(after > before))
    return ProbeRetention(
        task=task,
        floor=floor,
        retention=float((after.mean() - floor) / above) if known else nan,
        **scored,
        delta=float(after.mean() - score),
        # Of right-or-wrong items this is sqrt((lost + gained) - (gained - lost)^2) / sqrt(n).
        stderr_paired=float((after - before).std() / sqrt(len(before))),
        lost=lost,
        gained=gained,
        lost_corrected=beyond_guessing(lost, **scored, chance=chance),
        gained_corrected=beyond_guessing(gained, **scored, chance=chance),
        reason="" if known else f"{task}: {at_floor}",
    )


def _credible_interval(pairs: Mapping[str, Floats], floor: Mapping[str, float]) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of the retention ratio under a Dirichlet posterior over each probe's pairs (before, after).

    A pair weighs as often as it was seen, and each of the four pairs of right and wrong half an item more. Without those halves this is the
    Bayesian bootstrap (Rubin 1981), which knows no flip that it has not seen: the interval of a small probe is then too narrow, of one without
    flips nothing. With them each accuracy has the posterior Beta(1 + right, 1 + wrong) of arXiv 2503.01747, section 3.1.
    """
    generator, above = np.random.default_rng(POSTERIOR_SEED), np.zeros((2, POSTERIOR_DRAWS))
    for name, pair in pairs.items():
        above += _posterior(pair, generator) - floor[name]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.quantile(above[1] / above[0], (0.025, 0.975))
    return float(low), float(high)


def _posterior(pair: Floats, generator: np.random.Generator) -> Floats:
    """The means of `pair` (2, items) that a posterior draws, (2, POSTERIOR_DRAWS)."""
    # Equal pairs are drawn as one: four numbers a draw for right-or-wrong items, however many there are.
    seen = np.concatenate([pair, CORNERS], axis=1)
    outcomes, place = np.unique(seen, axis=1, return_inverse=True)
    weights = np.bincount(place, weights=[1.0] * pair.shape[1] + [0.5] * 4)
    drawn = generator.dirichlet(weights, size=POSTERIOR_DRAWS)
    # Not a product of matrices, in which BLAS adds in an order that depends on the processor and the number of threads.
    return np.array([(drawn * row).sum(axis=1) for row in outcomes])

"""What the scores of a run mean: accuracy over a stream, retention of base knowledge, drift of perplexity, intervals.

Pure functions of numpy arrays. Not here: how a score is measured (probes) or where it is stored (ledger).
A score matrix has shape (stages + 1, tasks): row 0 is the untouched model, row i the model after stage i; stage j + 1
trains on column j. A quantity that does not exist (backward transfer of one task) is NaN, never 0.

>>> round(bwt([[0.0, 0.0], [0.9, 0.1], [0.6, 0.8]]), 3)
-0.3
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
Outcomes = Mapping[str, ArrayLike]

# The item bootstrap always draws the same numbers, so that equal outcomes give equal intervals, on every call.
BOOTSTRAP_SEED = 16
BOOTSTRAP_DRAWS = 2000


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
    """What one probe says of kept knowledge, as fractions of 1.

    `retention` is (after - chance) / (before - chance): it may be negative or above 1, and is NaN where the untouched
    model is within two standard errors of chance (`reason` says so). `delta` is after - before, `stderr_paired` its standard
    error over the same items. `lost` and `gained` are the shares of items that turned wrong and right.
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

    `low` and `high` bound it at 95 % (paired item bootstrap within each probe). `minimum` is the worst probe's own retention and `minimum_probe`
    its name. `lost` and `gained` are means over probes. `reason` says why a number is NaN, and is empty where none is.
    """

    retention: float = nan
    low: float = nan
    high: float = nan
    minimum: float = nan
    minimum_probe: str = ""
    lost: float = nan
    gained: float = nan
    probes: tuple[ProbeRetention, ...] = ()
    reason: str


def retention(before: Outcomes, *, after: Outcomes, chance: Mapping[str, float]) -> Retention:
    """Share of base knowledge kept, as a fraction of 1.

    `before` and `after` map a probe's name to its per-item outcomes in [0, 1], (items,), same items in the same order;
    `chance` maps it to the mean over items of 1 / choices (0 for generated answers).
    """
    pairs = {name: np.array([before[name], after[name]], dtype=np.float64) for name in before}
    probes = tuple(_probe_retention(name, *pair, chance=chance[name]) for name, pair in pairs.items())
    above_before = sum(probe.before - chance[probe.name] for probe in probes)
    above_after = sum(probe.after - chance[probe.name] for probe in probes)
    stderr = sqrt(sum(items.var() / len(items) for items, _ in pairs.values()))
    reasons = [probe.reason for probe in probes if probe.reason]
    kept = low = high = nan
    if above_before > 2 * stderr:
        kept = float(above_after / above_before)
        low, high = _bootstrap_interval(pairs, chance)
    else:
        reasons.append("all probes: the untouched model is within two standard errors of chance")
    minimum, worst = min(((probe.retention, probe.name) for probe in probes if not probe.reason), default=(nan, ""))
    lost, gained = np.mean([(probe.lost, probe.gained) for probe in probes], axis=0).tolist()
    bounds = {"low": low, "high": high, "minimum": minimum, "minimum_probe": worst, "lost": lost, "gained": gained}
    return Retention(retention=kept, **bounds, probes=probes, reason="; ".join(reasons))


def perplexity_ratio(nll_before: ArrayLike, nll_after: ArrayLike, *, count: float) -> Floats:
    """Perplexity after over perplexity before, from total negative log-likelihoods in nats over `count` units."""
    with np.errstate(over="ignore"):
        return np.exp((np.asarray(nll_after) - nll_before) / count)


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


def _task_by_task(scores: ArrayLike, *, at_least: int) -> Floats:
    """The score matrix if each stage trained one task (not so in joint training) and there are enough; else NaN, as all that follows."""
    matrix = _matrix(scores)
    return matrix if len(matrix) - 1 == matrix.shape[1] >= at_least else np.full((3, 2), nan)


def _probe_retention(name: str, before: Floats, after: Floats, *, chance: float) -> ProbeRetention:
    score, stderr, above = before.mean(), before.std() / sqrt(len(before)), before.mean() - chance
    at_chance = (
        f"the untouched model scores {score:.3f}, within two standard errors ({stderr:.3f}) of chance {chance:.3f}"
    )
    known = above > 2 * stderr
    return ProbeRetention(
        name=name,
        retention=float((after.mean() - chance) / above) if known else nan,
        before=float(score),
        after=float(after.mean()),
        delta=float(after.mean() - score),
        # Of right-or-wrong items this is sqrt((lost + gained) - (gained - lost)^2) / sqrt(n).
        stderr_paired=float((after - before).std() / sqrt(len(before))),
        lost=float(np.mean(after < before)),
        gained=float(np.mean(after > before)),
        reason="" if known else f"{name}: {at_chance}",
    )


def _bootstrap_interval(pairs: Mapping[str, Floats], chance: Mapping[str, float]) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of the retention ratio when the items of each probe are drawn again, in pairs."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    above = np.zeros((2, BOOTSTRAP_DRAWS))
    for name, pair in pairs.items():
        # Drawing items with replacement is drawing how often each distinct (before, after) outcome occurs: four numbers
        # a draw for right-or-wrong items, however many there are.
        outcomes, counts = np.unique(pair, axis=1, return_counts=True)
        shares = generator.multinomial(counts.sum(), counts / counts.sum(), size=BOOTSTRAP_DRAWS) / counts.sum()
        above += outcomes @ shares.T - chance[name]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.quantile(above[1] / above[0], (0.025, 0.975))
    return float(low), float(high)

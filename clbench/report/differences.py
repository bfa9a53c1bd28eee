"""Which methods differ: paired differences over blocks, their intervals, p-values, verdicts and the ranks that these allow.

Pure functions of arrays. Not here: what is compared (measures) or where it is written (tables). A block is what two methods have in common when
they are run in one task order with one seed. A measure of one run is one of `values` (rows, blocks), NaN where it does not exist. Its items, where
they are kept, are `items` (rows, blocks, items), NaN where they were not measured: they form groups (a task's test questions, a probe's), `starts`
(groups,) holds the index at which each begins, and the means of a run's groups add up to its value.

>>> benjamini_hochberg([0.01, 0.04, 0.03]).round(3).tolist()
[0.03, 0.04, 0.04]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from math import ceil, isnan, nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtr, stdtrit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEWEST_BLOCKS = 6
"""With fewer no difference is claimed: five blocks that all agree have a sign-flip p of 2/32 = 0.0625."""
LEVEL = 0.05
"""The share of false claims among all claims that is put up with, and what an interval leaves out."""
POWER = 0.8
EXACT_BLOCKS = 14
"""Up to here all 2^blocks sign flips are tried; beyond, SIGN_DRAWS of them."""
SIGN_DRAWS = 20_000
DRAWS = 4000
SEED = 17
"""Draws begin from here on every call, so that equal values give equal bytes."""
BETTER, WORSE, NOT_SEPARATED, TOO_FEW = "better", "worse", "not separated", "too few blocks"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What a mean difference over blocks is uncertain by: variances of that mean, in the squared unit of the measure.

    `blocks`: by another draw of blocks, s^2 / B. `items`: what another draw of items adds. `freedom`: degrees of freedom of their sum.
    """

    blocks: float
    items: float
    freedom: float

    @property
    def stderr(self) -> float:
        """Standard error of the mean difference."""
        return sqrt(self.blocks + self.items)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How row `first` of a measure differs from row `second`: the columns of differences.csv. NaN where a number does not exist."""

    first: int
    second: int
    n_blocks: int
    n_items: int
    difference: float = nan
    low: float = nan
    high: float = nan
    p: float = nan
    p_permutation: float = nan
    q: float = nan
    verdict: str = TOO_FEW
    blocks_needed: float = nan


def compare(values: ArrayLike, *, items: ArrayLike, starts: Sequence[int], lower_is_better: bool) -> list[Difference]:
    """Every pair of rows, first before second, over the blocks that both have; a verdict is about the first.

    `values` (rows, blocks), `items` (rows, blocks, items), `starts` (groups,). A block in which the two measured other items is not common to them.
    Items count where both have them in all common blocks.

    The verdict needs two tests to agree. A sign-flip test of six blocks has no p below 2/64, so that Benjamini and Hochberg's correction over the
    325 pairs of 26 methods would let six blocks separate either at least 204 pairs or none. p is therefore that of a paired t-test, which has no
    such bound, and is corrected for the number of pairs; as it takes differences for normal, which six cannot show, the uncorrected sign-flip p,
    which does not, must be at most LEVEL as well (with six blocks: all six have one sign). The t-test's error holds what another draw of items adds
    (`spread`), so that one lucky question in every block does not pass for a difference between methods.

    Blocks are taken for independent. Two seeds of one order share what that order does to a method: where this is as large as the noise of a seed,
    3 orders x 2 seeds claim a difference between 8 equal methods in 17 % of cases (simulated; 5 % where it is 0, or with 6 orders x 1 seed).
    """
    values, items = np.asarray(values, dtype=np.float64), np.asarray(items, dtype=np.float64)
    known, sizes = ~np.isnan(items), np.diff([*starts, items.shape[2]])

    @cache
    def shared(common: tuple[int, ...], measured: bytes) -> tuple[Floats, Floats, Ints, Floats | None]:
        """What pairs with these blocks and items in common are compared by; they share the draws of the bootstrap, too."""
        has = np.frombuffer(measured, dtype=bool)
        means, outcomes = values[:, common], items[:, common][:, :, has]
        cut = np.flatnonzero(np.diff(np.repeat(np.arange(len(starts)), sizes)[has], prepend=-1))
        several = len(common) > 1
        drawn = bootstrap_means(np.nan_to_num(means), np.nan_to_num(outcomes), cut) if several else None
        return means, outcomes, cut, drawn

    pairs = combinations(range(len(values)), 2)
    found = [_difference(*pair, *shared(*_common(values, known, pair))) for pair in pairs]
    qs = benjamini_hochberg([one.p for one, _ in found])
    level = LEVEL * max(int(np.sum(qs <= LEVEL)), 1) / max(len(found), 1)
    judged = []
    for (one, error), q in zip(found, qs, strict=True):
        needed = blocks_needed(one.difference, error, n_blocks=one.n_blocks, level=level)
        judged.append(replace(one, q=float(q), verdict=_verdict(one, q, lower_is_better), blocks_needed=needed))
    return judged


def _common(values: Floats, measured: NDArray[np.bool_], pair: tuple[int, int]) -> tuple[tuple[int, ...], bytes]:
    """The blocks that a pair has in common, and which items both measured in all of them, (items,) as bytes."""
    first, second = measured[list(pair)]
    either_lacks = ~(first.any(axis=1) & second.any(axis=1))
    same = (first == second).all(axis=1) | either_lacks
    common = np.flatnonzero(np.isfinite(values[list(pair)]).all(axis=0) & same)
    known = (first & second)[common].all(axis=0) & (len(common) > 0)
    return tuple(common.tolist()), known.tobytes()


def _difference(
    first: int, second: int, values: Floats, items: Floats, starts: Ints, drawn: Floats | None
) -> tuple[Difference, Spread]:
    """The uncorrected difference of a pair of rows, of the blocks and items that both have; `drawn`: means of the bootstrap, from two blocks on."""
    n_blocks, n_items = values.shape[1], items.shape[2]
    one = Difference(first=first, second=second, n_blocks=n_blocks, n_items=n_items)
    each = values[first] - values[second]
    if drawn is None:
        mean = float(each[0]) if n_blocks else nan
        return replace(one, difference=mean), Spread(blocks=nan, items=nan, freedom=nan)
    each = np.round(each, 12)  # as equal scores that were added in another order must not differ
    mean, error = float(each.mean()), spread(each, items[first] - items[second], starts)
    low, high = interval(mean, drawn[:, first] - drawn[:, second], error)
    tests = {"p": t_test(mean, error), "p_permutation": sign_flip_test(each)} if n_blocks >= FEWEST_BLOCKS else {}
    return replace(one, difference=mean, low=low, high=high, **tests), error


def spread(differences: ArrayLike, items: ArrayLike, starts: Ints) -> Spread:
    """What the mean of `differences` (blocks,) is uncertain by; `items` (blocks, items) are their items, `starts` (groups,).

    Blocks and items are crossed random factors: every block asks the same items. With mean squares MS over blocks b, items i and their interaction,
    the variance of the mean is (MS_b + MS_i - MS_bi) / (B I), its degrees of freedom Satterthwaite's: Clark 1973 (J. Verbal Learning 12, the
    quasi-F), from Satterthwaite 1946 (Biometrics 2). Of each group alone, as its number of items is fixed. What items add is never below 0.
    """
    differences, items = np.asarray(differences, dtype=np.float64), np.asarray(items, dtype=np.float64)
    n_blocks, n_items = items.shape
    by_blocks, freedom = float(differences.var(ddof=1)) / n_blocks, float(n_blocks - 1)
    if not n_items:
        return Spread(blocks=by_blocks, items=0.0, freedom=freedom)
    sizes = np.diff([*starts, n_items])
    free, over_blocks = np.maximum(sizes - 1, 1), items.mean(axis=0)

    def centred(rows: Floats) -> Floats:
        return rows - np.repeat(np.add.reduceat(rows, starts, axis=-1) / sizes, sizes, axis=-1)

    by_items = np.add.reduceat(centred(over_blocks) ** 2, starts) / free / sizes
    rest = np.add.reduceat((centred(items - over_blocks) ** 2).sum(axis=0), starts)
    added = max(float(by_items.sum() - (rest / ((n_blocks - 1) * free) / (n_blocks * sizes)).sum()), 0.0)
    if added:
        weight = by_blocks**2 / (n_blocks - 1) + float((by_items**2 / free).sum())
        freedom = (by_blocks + added) ** 2 / weight
    return Spread(blocks=by_blocks, items=added, freedom=freedom)


def bootstrap_means(values: Floats, items: Floats, starts: Ints) -> Floats:
    """Means over blocks when blocks, and then the items of each group, are drawn again with replacement: (DRAWS, rows).

    `values` (rows, blocks), `items` (rows, blocks, items), `starts` (groups,). A draw is the same for all rows, which pairs them, and its items are
    the same in all blocks, as the blocks ask the same items: Owen and Eckles 2012 (Annals of Applied Statistics 6, "Bootstrapping data arrays").
    """
    generator, n_blocks = np.random.default_rng(SEED), values.shape[1]
    shares, means = _drawn(generator, n_blocks) / n_blocks, np.zeros((DRAWS, len(values)))
    for block in range(n_blocks):
        means += shares[:, [block]] * values[:, block]
    for start, end in zip(starts, [*starts, items.shape[2]][1:], strict=True):
        more, own = _drawn(generator, end - start) - 1, _on_grid(items[:, :, start:end])
        for block in range(n_blocks):
            means += shares[:, [block]] * (more @ own[:, block].T / (end - start))
    return means


def _drawn(generator: np.random.Generator, count: int) -> Floats:
    """How often each of `count` is among as many that are drawn with replacement: (DRAWS, count)."""
    drawn = generator.integers(count, size=(DRAWS, count)) + count * np.arange(DRAWS)[:, None]
    return np.bincount(drawn.ravel(), minlength=DRAWS * count).reshape(DRAWS, count).astype(np.float64)


def _on_grid(items: Floats) -> Floats:
    """`items` (rows, blocks, items) as multiples of a power of two so large that counts of `_drawn`, less 1, times items are added without rounding.

    BLAS adds in an order that depends on the processor and the number of threads, which sums that are exact do not show. The counts less 1 of n
    items are below 2n together, which is the room that a float's 53 bits must have: with 1000 items a multiple is 2^-42 of a row's largest.
    """
    _, highest = np.frexp(np.abs(items).max(axis=(1, 2), keepdims=True))
    step = np.ldexp(1.0, highest + (2 * items.shape[2]).bit_length() - 53)
    return np.round(items / step) * step


def interval(mean: float, drawn: Floats, error: Spread) -> tuple[float, float]:
    """95 % interval of a mean difference from its bootstrap `drawn` (DRAWS,), in the unit of the measure.

    Percentiles of six blocks are too narrow (they cover 86 % where blocks alone differ) and of blocks crossed with items too wide (99.7 % where
    nothing but the single answer is random). Their distances from the mean are therefore stretched by one factor, that which makes a normal of the
    draws' own deviation the Student interval of `error`. For blocks alone it is near the expanded percentile of Hesterberg 2015 (American
    Statistician 69).
    """
    deviation = float(drawn.std())
    if deviation == 0 or error.stderr == 0:
        return mean, mean
    stretch = stdtrit(error.freedom, 1 - LEVEL / 2) * error.stderr / (ndtri(1 - LEVEL / 2) * deviation)
    low, high = mean + stretch * (np.quantile(drawn, (LEVEL / 2, 1 - LEVEL / 2)) - mean)
    return float(low), float(high)


def t_test(mean: float, error: Spread) -> float:
    """Two-sided p of a paired t-test of no difference; without items it is the textbook's, of B - 1 degrees of freedom."""
    if error.stderr == 0:
        return float(mean == 0)
    return float(2 * stdtr(error.freedom, -abs(mean) / error.stderr))


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided p of no difference: the share of sign flips of `differences` (blocks,) whose mean is as far from 0 or further.

    All flips up to EXACT_BLOCKS blocks (Fisher 1935, section 21); beyond, SIGN_DRAWS drawn ones and the observed one, as p must not be 0 (Phipson
    and Smyth 2010).
    """
    differences = np.asarray(differences, dtype=np.float64)
    count = len(differences)
    if count <= EXACT_BLOCKS:
        signs = np.array(list(product((1.0, -1.0), repeat=count)))
    else:
        drawn = np.random.default_rng(SEED).integers(0, 2, size=(SIGN_DRAWS, count))
        signs = np.concatenate([np.ones((1, count)), 2.0 * drawn - 1])
    return float(np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12))


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """The least false discovery rate at which each test of `p` (tests,) is a discovery, (tests,); NaN is no test and stays NaN.

    Benjamini and Hochberg 1995. For all pairs of methods, whose tests depend on each other: Yekutieli 2008 (J. Stat. Planning and Inference 138).
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    q = np.full(len(p), nan)
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def blocks_needed(mean: float, error: Spread, *, n_blocks: int, level: float) -> float:
    """How many blocks a two-sided t-test at `level` needs to find `mean` in POWER of all cases; NaN where no number is enough.

    n = s^2 / (mean^2 / (z_(1 - level / 2) + z_POWER)^2 - v) + z_(1 - level / 2)^2 / 2 of Guenther 1981 (American Statistician 35), where s^2 is the
    variance between blocks and v what items add, which more blocks do not take away. At least FEWEST_BLOCKS. It takes the difference and the spread
    that were seen for the true ones: a guide to planning, no result.
    """
    z = float(ndtri(1 - level / 2))
    margin = mean**2 / (z + float(ndtri(POWER))) ** 2 - error.items
    if isnan(margin) or margin <= 0:
        return nan
    return float(max(ceil(error.blocks * n_blocks / margin + z**2 / 2), FEWEST_BLOCKS))


def rank_intervals(differences: Sequence[Difference], *, count: int) -> list[tuple[int, int]]:
    """The best and the worst rank of each of `count` rows that their verdicts leave open, 1 the best.

    From 1 + the number of rows that are better to `count` - the number that are worse; without verdicts that is everything.
    """
    ranks = [[1, count] for _ in range(count)]
    for one in differences:
        if one.verdict in (BETTER, WORSE):
            winner, loser = (one.first, one.second) if one.verdict == BETTER else (one.second, one.first)
            ranks[winner][1] -= 1
            ranks[loser][0] += 1
    return [(best, worst) for best, worst in ranks]


def _verdict(one: Difference, q: float, lower_is_better: bool) -> str:
    if one.n_blocks < FEWEST_BLOCKS:
        return TOO_FEW
    if not (q <= LEVEL and one.p_permutation <= LEVEL):
        return NOT_SEPARATED
    return BETTER if (one.difference > 0) != lower_is_better else WORSE

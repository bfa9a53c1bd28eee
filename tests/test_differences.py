"""Paired differences over blocks: by hand, against scipy.stats, and their error rates by simulation."""

from itertools import combinations

import numpy as np
import pytest
from pytest import approx
from scipy import special, stats

from clbench.report import differences
from clbench.report.differences import Spread, compare


def compared(values, *, items=None, starts=(), lower_is_better=False):
    """The differences of rows of `values`, by pair of rows."""
    values = np.asarray(values, dtype=float)
    items = np.empty((*values.shape, 0)) if items is None else np.asarray(items, dtype=float)
    found = compare(values, items=items, starts=list(starts), lower_is_better=lower_is_better)
    return {(one.first, one.second): one for one in found}


def of_items(items):
    """compare's arguments for one group of items, whose means are the values."""
    return {"values": np.mean(items, axis=2), "items": items, "starts": [0]}


def test_without_items_p_is_that_of_the_paired_t_test():
    values = np.random.default_rng(0).normal(size=(3, 7))
    found = compared(values)
    assert list(found) == list(combinations(range(3), 2))
    for (first, second), one in found.items():
        oracle = stats.ttest_rel(values[first], values[second])
        assert (one.p, one.difference) == approx((oracle.pvalue, (values[first] - values[second]).mean()))
        assert (one.n_blocks, one.n_items) == (7, 0)


def test_what_items_add_is_the_crossed_analysis_of_variance():
    # Block means .5 and 2.5, item means 2 and 1, mean 1.5, no interaction: MS_b 4, MS_i 1, MS_bi 0, over 4 cells.
    error = differences.spread([0.5, 2.5], [[1.0, 0.0], [3.0, 2.0]], np.array([0]))
    assert (error.blocks, error.items) == (1.0, 0.25)
    assert error.freedom == approx(1.25**2 / (1.0**2 + 0.25**2))  # Satterthwaite, one degree each
    # Nothing but interaction: MS_i is 0 and MS_bi is 1. Items add nothing, never less.
    error = differences.spread([0.5, 0.5], [[1.0, 0.0], [0.0, 1.0]], np.array([0]))
    assert (error.blocks, error.items, error.freedom) == (0.0, 0.0, 1.0)


def test_items_vary_within_their_group_alone():
    # Two groups of two equal items: groups differ by 10, but no item differs from the other of its group.
    error = differences.spread([5.0, 7.0], [[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 6.0, 6.0]], np.array([0, 2]))
    assert (error.blocks, error.items) == (1.0, 0.0)


def test_sign_flips_are_counted():
    assert differences.sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert differences.sign_flip_test([1.0, 2.0, -3.0]) == 1.0
    assert differences.sign_flip_test([0.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == 4 / 64  # a tie counts as no sign
    sample = np.random.default_rng(1).normal(0.5, 1, size=9)
    oracle = stats.permutation_test((sample,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert differences.sign_flip_test(sample) == approx(oracle.pvalue)


def test_many_blocks_draw_their_sign_flips(monkeypatch):
    sample = np.random.default_rng(2).normal(0.3, 1, size=14)
    exact = differences.sign_flip_test(sample)
    monkeypatch.setattr(differences, "EXACT_BLOCKS", 13)
    drawn = differences.sign_flip_test(sample)
    assert drawn == differences.sign_flip_test(sample) and drawn == approx(exact, abs=0.01) and drawn != exact
    assert differences.sign_flip_test(np.ones(200)) > 0


def test_the_correction_is_benjamini_and_hochbergs():
    p = np.random.default_rng(3).random(30) ** 3
    assert differences.benjamini_hochberg(p) == approx(stats.false_discovery_control(p))
    with_gap = differences.benjamini_hochberg([0.02, np.nan, 0.01])
    assert with_gap == approx([0.02, np.nan, 0.02], nan_ok=True)  # of two tests


def test_six_blocks_separate_some_pairs_of_many_methods_though_no_sign_flip_could():
    # 24 equal methods, one that is far better and one that is far worse: 49 pairs of 325 differ.
    generator = np.random.default_rng(4)
    values = generator.normal(0, 0.01, size=(26, 6)) + np.array([0.5, *[0.0] * 24, -0.5])[:, None]
    found = compared(values)
    verdicts = {pair: one.verdict for pair, one in found.items()}
    assert all(verdicts[0, other] == "better" for other in range(1, 26))
    assert all(verdicts[other, 25] == "better" for other in range(25))
    assert sum(verdict == "not separated" for verdict in verdicts.values()) >= 274
    flips = differences.benjamini_hochberg([one.p_permutation for one in found.values()])
    assert flips.min() > 0.05


def test_a_claim_needs_the_sign_flips_too():
    # One block has the other sign: t is 5.2 (p = .003), the sign flips say 4/64.
    one = compared([[1.0, 1.0, 1.0, 1.0, 1.0, -0.01], [0.0] * 6])[0, 1]
    assert one.q < 0.05 < one.p_permutation and one.verdict == "not separated"


def test_five_blocks_are_too_few_whatever_they_say():
    one = compared([[0.9] * 4 + [0.91], [0.1] * 5])[0, 1]
    assert (one.verdict, one.n_blocks) == ("too few blocks", 5)
    assert np.isnan([one.p, one.p_permutation, one.q]).all()
    assert one.difference == approx(0.802)
    assert one.low < one.difference < one.high and one.blocks_needed >= 6
    single = compared([[0.9], [0.1]])[0, 1]
    assert single.difference == approx(0.8) and np.isnan([single.low, single.high, single.blocks_needed]).all()


@pytest.mark.parametrize(("lower_is_better", "verdict"), [(False, "better"), (True, "worse")])
def test_a_verdict_is_about_the_first(lower_is_better, verdict):
    values = [[0.9, 0.91, 0.92, 0.9, 0.91, 0.92], [0.1, 0.1, 0.1, 0.11, 0.1, 0.1]]
    assert compared(values, lower_is_better=lower_is_better)[0, 1].verdict == verdict


def test_equal_rows_are_not_separated():
    one = compared([[0.5] * 6, [0.5] * 6])[0, 1]
    assert (one.difference, one.low, one.high, one.p, one.verdict) == (0, 0, 0, 1, "not separated")
    # Equal but for the order in which they were added.
    one = compared([[0.1 + 0.2] * 6, [0.3] * 6])[0, 1]
    assert (one.difference, one.verdict) == (0, "not separated")


def test_one_question_of_two_hundred_is_no_difference_though_every_block_repeats_it():
    items = np.zeros((2, 6, 200))
    items[0, :, 17] = 1.0
    one = compared(**of_items(items))[0, 1]
    assert (one.difference, one.n_items) == (approx(0.005), 200)
    assert one.p > 0.3 and one.verdict == "not separated" and one.low <= 0 < one.high
    assert compared(of_items(items)["values"])[0, 1].verdict == "better"  # which items keep from being claimed


def test_only_common_blocks_count():
    nan = np.nan
    found = compared([[1.0, 2.0, nan, 4.0], [0.0, nan, 0.0, 1.0], [nan, nan, 7.0, nan]])
    assert (found[0, 1].n_blocks, found[0, 1].difference) == (2, 2.0)
    assert (found[1, 2].n_blocks, found[1, 2].difference) == (1, -7.0)
    assert found[0, 2].n_blocks == 0 and np.isnan(found[0, 2].difference)


def test_blocks_that_measured_other_items_are_not_common():
    items = np.full((3, 6, 5), np.nan)
    items[:2, :, :3] = np.random.default_rng(5).random((2, 6, 3))
    items[2, :, 3:] = 0.5
    found = compared(np.nanmean(items, axis=2), items=items, starts=[0, 3])
    assert (found[0, 1].n_blocks, found[0, 1].n_items) == (6, 3)
    assert found[0, 2].n_blocks == found[1, 2].n_blocks == 0 and found[0, 2].verdict == "too few blocks"


def test_a_row_whose_items_were_not_kept_is_compared_without_items():
    items = np.random.default_rng(6).random((2, 6, 4))
    values = items.mean(axis=2)
    items[1] = np.nan
    one = compared(values, items=items, starts=[0])[0, 1]
    assert (one.n_blocks, one.n_items, one.p) == (6, 0, approx(stats.ttest_rel(*values).pvalue))


@pytest.mark.parametrize("effect", [0.4, 0.8, 1.5])
def test_so_many_blocks_have_the_power_that_is_asked_for(effect):
    def power(count):
        least = special.stdtrit(count - 1, 1 - 0.01 / 2)
        return 1 - special.nctdtr(count - 1, effect * np.sqrt(count), least)

    needed = differences.blocks_needed(effect, Spread(blocks=1 / 8, items=0.0, freedom=7), n_blocks=8, level=0.01)
    assert power(needed - 2) < 0.8 < power(needed + 1)


def test_more_blocks_do_not_help_where_items_are_too_few():
    few = Spread(blocks=0.01, items=0.5, freedom=5)
    assert np.isnan(differences.blocks_needed(1.0, few, n_blocks=6, level=0.05))
    assert np.isnan(differences.blocks_needed(0.0, Spread(blocks=1, items=0, freedom=5), n_blocks=6, level=0.05))


def test_ranks_are_what_the_verdicts_leave_open():
    # 0 beats 2 and 3, 1 beats 3, the rest is open.
    values = np.array([[3.0], [2.0], [1.0], [0.0]]) + np.random.default_rng(7).normal(0, 0.01, size=(4, 6))
    values[1] += [2, -2, 2, -2, 0.3, 0.3]  # cannot be told from 0 and 2
    found = compared(values)
    verdicts = {pair: one.verdict for pair, one in found.items()}
    assert [pair for pair, verdict in verdicts.items() if verdict == "better"] == [(0, 2), (0, 3), (2, 3)]
    assert differences.rank_intervals(list(found.values()), count=4) == [(1, 2), (1, 4), (2, 3), (3, 4)]
    assert differences.rank_intervals([], count=3) == [(1, 3)] * 3


def test_equal_arrays_give_equal_numbers_whatever_the_global_random_state():
    items = np.random.default_rng(8).random((3, 6, 20))
    np.random.seed(0)
    first = compared(**of_items(items))
    np.random.seed(1)
    assert compared(**of_items(items)) == first


REGIMES = {"blocks": (1.0, 0.0, 0.1), "items": (0.0, 1.0, 0.5), "answers": (0.0, 0.0, 1.0), "all": (0.1, 1.0, 2.0)}
"""Standard deviations of what a block, an item and the single answer add."""


@pytest.mark.parametrize("regime", REGIMES)
def test_intervals_cover_the_truth_at_their_nominal_rate(regime):
    of_block, of_item, of_answer = REGIMES[regime]
    generator, count, blocks, items = np.random.default_rng(9), 1000, 6, 60
    drawn = of_block * generator.normal(size=(count, blocks, 1)) + of_item * generator.normal(size=(count, 1, items))
    drawn = drawn + of_answer * generator.normal(size=(count, blocks, items))  # the truth is 0
    values, starts = drawn.mean(axis=2), np.array([0])
    means, covered = differences.bootstrap_means(values, drawn, starts), 0
    for row in range(count):
        error = differences.spread(values[row], drawn[row], starts)
        low, high = differences.interval(values[row].mean(), means[:, row], error)
        covered += low <= 0 <= high
    assert 0.92 <= covered / count <= 0.97


@pytest.mark.parametrize("noise", ["normal", "heavy"])
def test_methods_that_do_not_differ_are_rarely_said_to(noise, monkeypatch):
    monkeypatch.setattr(differences, "DRAWS", 10)  # intervals are not asked for
    generator, wins = np.random.default_rng(10), 0
    for _ in range(200):
        draw = generator.normal if noise == "normal" else lambda size: generator.standard_t(3, size=size)
        found = compared(0.05 * draw(size=(6, 6)) + 0.1 * generator.normal(size=6))  # a block moves all alike
        wins += any(one.verdict == "better" for one in found.values())
    assert wins / 200 <= 0.05

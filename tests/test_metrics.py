"""Numbers worked out by hand, in the comments beside them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from pytest import approx

from clbench.report import metrics

# Three tasks; row 0 is the untouched model, row i the model after stage i, stage j + 1 trains on column j.
SCORES = np.array([[0.10, 0.20, 0.30], [0.80, 0.25, 0.30], [0.90, 0.70, 0.40], [0.50, 0.60, 0.90]])


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert metrics.average_accuracy(SCORES) == approx(2.0 / 3)  # (.5 + .6 + .9) / 3


def test_learning_accuracy_is_the_mean_score_at_each_own_stage():
    assert metrics.learning_accuracy(SCORES) == approx(0.8)  # (.8 + .7 + .9) / 3


def test_backward_transfer_divides_by_one_less_than_the_tasks():
    assert metrics.bwt(SCORES) == approx(-0.2)  # ((.5 - .8) + (.6 - .7)) / 2


def test_forgetting_is_the_drop_from_the_best_earlier_score():
    assert metrics.forgetting(SCORES) == approx(0.25)  # ((.9 - .5) + (.7 - .6)) / 2


def test_forgetting_is_negative_where_the_last_stage_is_the_best():
    assert metrics.forgetting([[0.0, 0.0], [0.4, 0.0], [0.7, 0.5]]) == approx(-0.3)  # .4 - .7


def test_forgetting_ignores_scores_before_the_own_stage():
    # The second task scores .9 untouched and after stage 1, but only .5 once trained: .5 - .4.
    assert metrics.forgetting([[0, 0.9, 0], [0, 0.9, 0], [0, 0.5, 0], [0, 0.4, 0]]) == approx(0.05)  # (0 + .1) / 2


def test_forward_transfer_compares_with_the_untouched_model():
    assert metrics.fwt(SCORES) == approx(0.075)  # ((.25 - .20) + (.40 - .30)) / 2


def test_accuracy_so_far_averages_the_tasks_trained_up_to_each_stage():
    assert metrics.accuracy_so_far(SCORES) == approx([0.8, 0.8, 2.0 / 3])


def test_published_trace_numbers_come_out_with_the_t_minus_1_denominator():
    # TRACE, LLaMA-2-7B-chat SeqFT: own-stage and final scores give OP .487 and BWT -.083 as printed; 1/T would give -.072.
    own = [0.50, 0.735, 0.523, 0.580, 0.764, 0.383, 0.582, 0.408]
    final = [0.454, 0.609, 0.457, 0.512, 0.637, 0.272, 0.548, 0.408]
    scores = np.zeros((9, 8))
    scores[np.arange(1, 9), np.arange(8)] = own
    scores[-1] = final
    assert metrics.average_accuracy(scores) == approx(0.487, abs=5e-4)
    assert metrics.bwt(scores) == approx(-0.083, abs=5e-4)


def test_one_task_has_no_transfer():
    scores = [[0.2], [0.9]]
    assert metrics.average_accuracy(scores) == metrics.learning_accuracy(scores) == 0.9
    for undefined in (metrics.bwt, metrics.forgetting, metrics.fwt):
        assert np.isnan(undefined(scores))


def test_joint_training_has_an_average_accuracy_and_nothing_per_stage():
    scores = [[0.2, 0.4, 0.3], [0.9, 0.6, 0.9]]  # one stage trains all three tasks
    assert metrics.average_accuracy(scores) == approx(0.8)
    for undefined in (metrics.learning_accuracy, metrics.bwt, metrics.forgetting, metrics.fwt):
        assert np.isnan(undefined(scores))


def test_a_missing_cell_is_not_papered_over():
    scores = SCORES.copy()
    scores[1, 0] = np.nan
    assert np.isnan(metrics.bwt(scores)) and np.isnan(metrics.learning_accuracy(scores))
    assert metrics.average_accuracy(scores) == approx(2.0 / 3)


def outcomes(*runs):
    """outcomes((3, 1), (2, 0)) is [1, 1, 1, 0, 0]."""
    return np.concatenate([np.full(count, float(value)) for count, value in runs])


def two_probes():
    """Before and after: "four" (100 items, chance .25) goes 80 -> 60 right, "two" (100 items, chance .5) 70 -> 65."""
    before = {"four": outcomes((80, 1), (20, 0)), "two": outcomes((70, 1), (30, 0))}
    after = {
        "four": outcomes((55, 1), (25, 0), (5, 1), (15, 0)),  # 25 lost, 5 gained
        "two": outcomes((60, 1), (10, 0), (5, 1), (25, 0)),  # 10 lost, 5 gained
    }
    return before, after, {"four": 0.25, "two": 0.5}


def kept(before, after, chance, floor=None):
    """Retention whose floor is chance, unless it is given."""
    return metrics.retention(before, after=after, floor=floor or chance, chance=chance)


def test_retention_is_a_ratio_of_chance_corrected_sums():
    before, after, chance = two_probes()
    record = kept(before, after, chance)
    assert record.retention == approx(0.5 / 0.75)  # (.35 + .15) / (.55 + .20); the mean of the ratios would be .693
    four, two = record.probes
    assert four.retention == approx(0.35 / 0.55) and two.retention == approx(0.15 / 0.20)
    assert (record.retention_min, record.retention_min_probe) == (four.retention, "four")
    assert record.reason == ""


def test_retention_counts_items_lost_and_gained():
    before, after, chance = two_probes()
    four, two = kept(before, after, chance).probes
    assert (four.lost, four.gained, four.delta) == approx((0.25, 0.05, -0.20))
    assert (two.lost, two.gained, two.delta) == approx((0.10, 0.05, -0.05))
    assert four.stderr_paired == approx(np.sqrt(0.30 - 0.20**2) / 10)  # sqrt((F + B) - (B - F)^2) / sqrt(n)
    assert two.stderr_paired == approx(np.sqrt(0.15 - 0.05**2) / 10)


def test_an_unchanged_model_retains_everything():
    before, _, chance = two_probes()
    record = kept(before, before, chance)
    assert (record.retention, record.retention_min, record.lost, record.gained) == (1.0, 1.0, 0.0, 0.0)
    assert 0.95 < record.retention_low < 1.0 < record.retention_high < 1.05


def test_a_model_at_chance_retains_nothing_though_half_its_answers_are_right():
    record = kept({"two": outcomes((90, 1), (10, 0))}, {"two": outcomes((50, 1), (50, 0))}, {"two": 0.5})
    assert record.retention == approx(0.0)


def test_retention_is_nan_with_a_reason_where_the_untouched_model_is_at_chance():
    # .28 right of 100 items: standard error .045, and .28 - .25 is less than twice that.
    before, after, chance = two_probes()
    before["weak"], after["weak"], chance["weak"] = outcomes((28, 1), (72, 0)), outcomes((1, 1), (99, 0)), 0.25
    record = kept(before, after, chance)
    assert np.isnan(record.probes[2].retention) and "weak" in record.reason and "floor 0.250" in record.reason
    assert record.retention_min_probe == "four"
    assert record.retention == approx((0.35 + 0.15 - 0.24) / (0.55 + 0.20 + 0.03))  # every probe stays in the sums


def test_retention_of_nothing_but_chance_is_nan():
    record = kept({"a": outcomes((5, 1), (5, 0))}, {"a": outcomes((9, 1), (1, 0))}, {"a": 0.5})
    assert np.isnan([record.retention, record.retention_low, record.retention_high, record.retention_min]).all()
    assert record.retention_min_probe == "" and record.reason


def right_before_and_after(generator, items, *, right, lost, gained):
    """Outcomes of `items` items: right before with probability `right`, of which `lost` turn wrong, and of the wrong ones `gained` right."""
    before = generator.random(items) < right
    after = np.where(before, generator.random(items) >= lost, generator.random(items) < gained)
    return before.astype(float), after.astype(float)


@pytest.mark.parametrize(
    ("items", "right", "lost", "gained"),
    # (.8 * .7 + .2 * .2) / .8 = .75; few items, few of them wrong, few flips: where the item bootstrap covers .73 of the time, and .37.
    [(400, 0.8, 0.3, 0.2), (40, 0.9, 0.05, 0.1), (30, 0.95, 0.02, 0.02)],
)
def test_retention_interval_covers_the_truth_at_its_nominal_rate(items, right, lost, gained):
    generator, covered = np.random.default_rng(1), 0
    truth = (right * (1 - lost) + (1 - right) * gained) / right
    for _ in range(300):
        before, after = right_before_and_after(generator, items, right=right, lost=lost, gained=gained)
        record = kept({"p": before}, {"p": after}, {"p": 0.0})
        covered += record.retention_low <= truth <= record.retention_high
    assert 0.91 <= covered / 300


def test_the_interval_of_large_probes_is_the_item_bootstraps():
    generator = np.random.default_rng(2)
    before, after = right_before_and_after(generator, 4000, right=0.8, lost=0.3, gained=0.2)
    record = kept({"p": before}, {"p": after}, {"p": 0.25})
    drawn = generator.integers(0, 4000, (2000, 4000))
    ratios = (after[drawn].mean(axis=1) - 0.25) / (before[drawn].mean(axis=1) - 0.25)
    assert (record.retention_low, record.retention_high) == approx(np.quantile(ratios, (0.025, 0.975)), abs=0.003)


def test_the_interval_is_paired():
    # Both halves right at random, but the same items: nothing is lost, so little is uncertain.
    before = np.random.default_rng(3).integers(0, 2, 200).astype(float)
    record = kept({"p": before}, {"p": before.copy()}, {"p": 0.0})
    assert 0.97 < record.retention_low < record.retention_high < 1.03
    shuffled = kept({"p": before}, {"p": np.random.default_rng(4).permutation(before)}, {"p": 0.0})
    assert shuffled.retention_high - shuffled.retention_low > 0.3


def test_a_constant_answer_keeps_nothing_of_a_probe_most_of_whose_items_it_gets_right():
    # 62 of 100 answers are yes. A model that knew 90 says yes to everything: without the majority as floor it would keep .12 / .40 = .30.
    yes, knew = outcomes((62, 1), (38, 0)), outcomes((56, 1), (6, 0), (34, 1), (4, 0))
    for constant in (yes, 1 - yes):
        record = kept({"p": knew}, {"p": constant}, {"p": 0.5}, floor={"p": 0.62})
        assert record.retention <= 0.05 and record.probes[0].retention <= 0.05
    assert kept({"p": knew}, {"p": yes}, {"p": 0.5}).retention == approx(0.30)
    weak = kept({"p": outcomes((65, 1), (35, 0))}, {"p": yes}, {"p": 0.5}, floor={"p": 0.62})
    assert (
        np.isnan(weak.retention) and "floor 0.620" in weak.reason
    )  # .65 beats chance by 3 standard errors, "yes" by .6


@pytest.mark.parametrize("choices", [2, 3, 5])
@pytest.mark.parametrize("share", [0.5, 0.62, 0.8])
def test_no_constant_answer_keeps_knowledge_of_imbalanced_items(choices, share):
    # 400 items; the first label is right in `share` of them, the others equally often in the rest. The untouched model knew 95 in 100.
    right = np.repeat(range(choices), [round(400 * share), *[round(400 * (1 - share) / (choices - 1))] * (choices - 1)])
    knew = (np.random.default_rng(6).random(len(right)) < 0.95).astype(float)
    floor = {"p": max(1 / choices, np.bincount(right).max() / len(right))}
    for label in range(choices):
        answered = (right == label).astype(float)
        assert kept({"p": knew}, {"p": answered}, {"p": 1 / choices}, floor).retention <= 0.05


def test_items_lost_and_gained_beyond_guessing():
    # "four": .80 -> .60, k = 4: (1 - .8) (1 - .6) / 3 = .026667 of the items flip either way by guessing.
    before, after, chance = two_probes()
    four, two = kept(before, after, chance).probes
    assert (four.lost_corrected, four.gained_corrected) == approx((0.25 - 0.08 / 3, 0.05 - 0.08 / 3))
    # "two": .70 -> .65, k = 2: .3 * .35 = .105, more than the raw .10 lost and .05 gained.
    assert (two.lost_corrected, two.gained_corrected) == (0.0, 0.0)
    assert metrics.beyond_guessing(0.2, before=0.5, after=0.5, chance=0.0) == 0.2  # written answers are not guessed
    assert metrics.beyond_guessing(0.0, before=1.0, after=1.0, chance=1.0) == 0.0


def test_a_model_that_only_guesses_loses_and_gains_nothing_beyond_guessing():
    generator = np.random.default_rng(5)
    before, after = (generator.random((2, 100_000)) < 0.25).astype(float)
    (guesser,) = kept({"p": before}, {"p": after}, {"p": 0.25}).probes
    assert guesser.lost == approx(0.1875, abs=0.005) and guesser.lost_corrected == approx(0.0, abs=0.005)
    assert guesser.gained_corrected == approx(0.0, abs=0.005)


def test_intervals_do_not_depend_on_or_touch_global_random_state():
    before, after, chance = two_probes()
    np.random.seed(0)
    first = kept(before, after, chance)
    state = np.random.get_state()[1].tolist()
    np.random.seed(1)
    assert kept(before, after, chance) == first
    np.random.seed(0)
    assert np.random.get_state()[1].tolist() == state
    assert first.retention_low < first.retention < first.retention_high


def test_perplexity_ratio():
    assert metrics.perplexity_ratio(1.0, 1.0 + np.log(3), count=1) == approx(3.0)
    assert metrics.perplexity_ratio(100.0, 100.0 + 50 * np.log(2), count=50) == approx(2.0)
    assert metrics.perplexity_ratio(0.0, 1e6, count=1) == np.inf
    with np.errstate(all="raise"):  # numpy would warn, of a row without text, in the terminal
        assert np.isnan(metrics.perplexity_ratio([0.0], [np.nan], count=1)).all()


def test_interval_is_students_t():
    # Mean 2, sample deviation 1, n = 3: t(2, .975) = 4.302653, half = 4.302653 / sqrt(3) = 2.484138.
    assert metrics.interval([1.0, 2.0, 3.0]) == approx((2.0, 2.0 - 2.484138, 2.0 + 2.484138), rel=1e-6)


def test_interval_of_one_value_has_no_bounds():
    assert metrics.interval([0.7]) == approx((0.7, np.nan, np.nan), nan_ok=True)
    assert metrics.interval([1.0, np.inf]) == approx((np.inf, np.nan, np.nan), nan_ok=True)
    assert np.isnan(metrics.interval([1.0, np.nan])).all()  # an unknown seed is not left out
    assert metrics.interval([]) == approx((np.nan, np.nan, np.nan), nan_ok=True)


def test_interval_of_equal_values_is_that_value():
    assert metrics.interval([0.1, 0.1, 0.1]) == (0.1, 0.1, 0.1)


def test_metrics_need_neither_torch_nor_pandas():
    code = "import json, sys, clbench.report.metrics; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert not {"torch", "pandas", "scipy.stats"} & set(loaded)


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((0, 2))])
def test_a_score_array_of_another_shape_is_our_mistake(scores):
    with pytest.raises(AssertionError):
        metrics.average_accuracy(scores)


@pytest.mark.parametrize(("both", "first", "second", "neither"), [(40, 9, 3, 8), (6, 0, 0, 0), (0, 5, 5, 90)])
def test_the_paired_interval_is_that_of_a_dirichlet_posterior_with_half_an_item_a_corner(both, first, second, neither):
    pairs = [(1.0, 1.0)] * both + [(1.0, 0.0)] * first + [(0.0, 1.0)] * second + [(0.0, 0.0)] * neither
    low, high = metrics.paired_interval(*zip(*pairs, strict=True))
    # A Dirichlet is gammas over their sum; here drawn otherwise, and a hundred times as often.
    drawn = np.random.default_rng(3).gamma([both + 0.5, first + 0.5, second + 0.5, neither + 0.5], size=(200_000, 4))
    expected = np.quantile((drawn[:, 1] - drawn[:, 2]) / drawn.sum(axis=1), (0.025, 0.975))
    assert (low, high) == pytest.approx(expected.tolist(), abs=0.02)
    assert low < 0 < high or both == 40


@pytest.mark.parametrize(("items", "first", "second"), [(30, 0.15, 0.05), (12, 0.1, 0.1), (200, 0.3, 0.1)])
def test_the_paired_interval_holds_the_true_difference_in_95_percent_of_cases(items, first, second):
    rng, held, cases = np.random.default_rng(5), 0, 400
    for _ in range(cases):
        kind = rng.choice(
            3, size=items, p=[first, second, 1 - first - second]
        )  # right in the first alone, in the second alone, in both
        low, high = metrics.paired_interval(kind != 1, kind != 0)
        held += low <= first - second <= high
    assert 0.92 <= held / cases <= 0.99

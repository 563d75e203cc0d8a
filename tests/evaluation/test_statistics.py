"""Intervals, tests and calibration against slow independent oracles and their own promises."""

import math
import random
from itertools import product

import numpy as np
import pytest

from palate.evaluation.statistics import (
    bootstrap_mean,
    bootstrap_ratio,
    calibration,
    correlation,
    explained_variance,
    paired_bootstrap,
    preference_calibration,
    standard_error,
    wilson,
)


def wilson_by_bisection(successes, trials, level=0.95):
    """The limits are the p where the score test is just rejected: |p̂ − p| = z √(p(1−p)/n)."""
    z, share = normal_quantile(0.5 + level / 2), successes / trials

    def excess(p):
        return abs(share - p) - z * math.sqrt(p * (1 - p) / trials)

    return bisect(excess, 0.0, share), bisect(excess, 1.0, share)


def bisect(excess, outside, inside):
    for _ in range(200):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if excess(middle) > 0 else (outside, middle)
    return inside


def normal_quantile(share):
    low, high = -9.0, 9.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + math.erf(middle / math.sqrt(2))) / 2 < share else (low, middle)
    return low


@pytest.mark.parametrize(("successes", "trials"), [(1, 10), (5, 10), (81, 263), (7.5, 9), (999, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_inverts_the_score_test(successes, trials, level):
    found = wilson(successes, trials, level)
    assert (found.low, found.high) == pytest.approx(wilson_by_bisection(successes, trials, level), abs=1e-9)
    assert found.estimate == successes / trials


def test_wilson_at_the_ends_stays_inside_and_keeps_doubt():
    none, all_of_them = wilson(0, 20), wilson(20, 20)
    assert none.low == pytest.approx(0, abs=1e-12)
    assert 0.1 < none.high < 0.2
    assert all_of_them.high == pytest.approx(1, abs=1e-12)
    assert 0.8 < all_of_them.low < 0.9


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, trials):
    with pytest.raises(ValueError, match="a proportion needs"):
        wilson(successes, trials)


def test_bootstrap_of_three_values_agrees_with_listing_all_resamples():
    values = [1.0, 2.0, 6.0]
    means = sorted(sum(draw) / 3 for draw in product(values, repeat=3))
    found = bootstrap_mean(values, ("all",), null=1.0, resamples=40_000)
    assert found.estimate == 3.0
    exact = sum(abs(m - 3.0) >= 2.0 - 1e-12 for m in means) / len(means)
    assert found.p_value == pytest.approx(exact, abs=0.01)
    assert found.low in means
    assert found.high in means
    assert abs(sum(m < found.low for m in means) / 27 - 0.025) < 0.04


def test_bootstrap_is_a_function_of_its_key_alone():
    values = list(np.linspace(-1, 2, 50))
    assert bootstrap_mean(values, ("a", 1)) == bootstrap_mean(values, ("a", 1))
    assert bootstrap_mean(values, ("a", 1)) != bootstrap_mean(values, ("a", 2))


def test_bootstrap_does_not_depend_on_how_many_draws_are_held_at_once(monkeypatch):
    whole = bootstrap_mean([0.0, 1.0, 5.0, 2.0], resamples=1000)
    monkeypatch.setattr("palate.evaluation.statistics._DRAWS_AT_ONCE", 400)
    assert bootstrap_mean([0.0, 1.0, 5.0, 2.0], resamples=1000) == whole


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    draw = random.Random(3)
    covered = 0
    for trial in range(200):
        found = bootstrap_mean([draw.gauss(1.0, 2.0) for _ in range(60)], ("cover", trial), resamples=500)
        covered += found.low <= 1.0 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_p_value_is_uniform_without_an_effect_and_small_with_one():
    draw = random.Random(4)
    rejected = 0
    for trial in range(200):
        values = [draw.gauss(0.0, 1.0) for _ in range(60)]
        rejected += bootstrap_mean(values, ("null", trial), resamples=500).p_value < 0.05
    assert 0.01 <= rejected / 200 <= 0.10
    assert bootstrap_mean([draw.gauss(1.0, 1.0) for _ in range(60)], resamples=999).p_value == 0.001


def test_bootstrap_ratio_draws_whole_units():
    """Five copies of every row inside its unit add no evidence; as rows of their own they would."""
    draw = random.Random(5)
    values = [draw.gauss(0.2, 1.0) for _ in range(40)]
    once = bootstrap_mean(values, ("unit",))
    grouped = bootstrap_ratio([5 * v for v in values], [5.0] * 40, ("unit",))
    loose = bootstrap_mean([v for v in values for _ in range(5)], ("unit",))
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    assert loose.high - loose.low < 0.6 * (once.high - once.low)


def test_bootstrap_ratio_weighs_units_by_their_size():
    assert bootstrap_ratio([1.0, 9.0], [1.0, 3.0]).estimate == 2.5


def test_paired_bootstrap_sees_through_shared_noise():
    draw = random.Random(6)
    hard = [draw.gauss(0, 10) for _ in range(100)]
    ours = [h + 0.5 + draw.gauss(0, 0.5) for h in hard]
    found = paired_bootstrap(ours, hard)
    assert found.p_value < 0.001
    assert 0.3 < found.low < found.estimate < found.high < 0.7


def test_unequal_or_empty_lists_are_refused():
    with pytest.raises(ValueError, match="one length"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least 1"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="denominator"):
        bootstrap_ratio([1.0], [0.0])


def test_calibration_error_by_hand():
    found = calibration([0.1, 0.15, 0.9, 0.95, 0.95], [0, 1, 1, 1, 0], bins=2)
    assert found.error == pytest.approx((2 * abs(0.5 - 0.125) + 3 * abs(2 / 3 - 2.8 / 3)) / 5)
    assert [b.count for b in found.bins] == [2, 3]


def test_true_bradley_terry_probabilities_are_calibrated_and_stretched_ones_are_not():
    draw = np.random.default_rng(7)
    truth = draw.normal(0, 1.5, 40_000)
    label = np.where(draw.random(40_000) < 1 / (1 + np.exp(-truth)), 1.0, -1.0)
    assert preference_calibration(truth * label).error < 0.01
    assert preference_calibration(3 * truth * label).error > 0.1
    assert preference_calibration(truth * label / 3).error > 0.1


def test_preference_calibration_does_not_care_which_answer_came_first():
    found = preference_calibration([2.0, 2.0, -2.0, 0.0])
    assert found.bins[0].predicted == 0.5
    assert found.bins[0].observed == 0.5
    assert found.bins[1].observed == pytest.approx(2 / 3)
    assert found.bins[1].predicted == pytest.approx(1 / (1 + math.exp(-2)))


def test_confidence_of_exactly_one_belongs_to_the_last_bin():
    assert [b.count for b in preference_calibration([900.0, -900.0]).bins] == [2]


def test_explained_variance():
    target = [1.0, 2.0, 3.0, 4.0]
    assert explained_variance(target, target) == 1
    assert explained_variance([2.5] * 4, target) == 0
    assert explained_variance([3.5] * 4, target) == pytest.approx(-1 / 1.25)
    assert explained_variance([1.5, 2.5, 3.5, 4.5], target) == pytest.approx(1 - 0.25 / 1.25)
    assert math.isnan(explained_variance([1.0, 2.0], [3.0, 3.0]))


def test_standard_error_and_correlation_by_definition():
    assert standard_error([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt((16 + 1 + 25) / 9 / 2 / 3))
    assert math.isnan(standard_error([1.0]))
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)
    assert correlation([1, 0, -1, 0], [0, 1, 0, -1]) == pytest.approx(0)
    assert math.isnan(correlation([1, 1], [0, 5]))

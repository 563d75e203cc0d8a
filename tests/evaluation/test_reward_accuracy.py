"""Reward-model accuracy: pairs of rankings, ties, truth, ceiling and length, by hand and by simulation."""

import math

import numpy as np
import pytest

from palate.evaluation.reward_accuracy import agreement, pairs_of, reward_accuracy
from palate.records import Ranking, preference


def ranking(*ranks):
    return Ranking(prompt="p", completions=tuple(f"answer {i}" for i in range(len(ranks))), ranks=ranks)


def test_a_ranking_becomes_its_comparable_pairs():
    found = pairs_of([ranking(1, 0, 1)], [[0.1, 0.5, 0.9]], [[3, 5, 9]], [[0.0, 2.0, 1.0]])
    assert found.score == pytest.approx([0.5 - 0.1, 0.5 - 0.9])
    assert list(found.length) == [2, -4]
    assert list(found.gold) == [2, 1]
    assert list(found.prompt) == [0, 0]


def test_ties_count_half_in_one_accuracy_and_nothing_in_the_strict_one():
    rows = [preference("p", "a", "b")] * 4
    found = reward_accuracy(pairs_of(rows, [[1, 0], [0, 1], [2, 2], [3, 0]], [[1, 1]] * 4))
    assert found.accuracy == 2.5 / 4
    assert found.strict == 2 / 4
    assert found.interval.low < found.accuracy < found.interval.high
    assert found.truth is None


def test_abstained_pairs_are_left_out():
    rows = [preference("p", "a", "b"), preference("q", "a", "b")]
    assert pairs_of(rows, [[1, 0], [math.nan, 0]], [[1, 1]] * 2).score.size == 1


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="no comparable pair"):
        reward_accuracy(pairs_of([ranking(0, 0)], [[1, 2]], [[1, 1]]))


def test_whole_rankings_are_the_evidence_not_their_pairs():
    """One nine-way ranking right throughout, one wrong throughout: 72 pairs, but two pieces of evidence."""
    rows = [ranking(*range(9))] * 2
    scores = [[-float(k) for k in range(9)], [float(k) for k in range(9)]]
    found = reward_accuracy(pairs_of(rows, scores, [[1.0] * 9] * 2))
    assert (found.pairs, found.prompts, found.accuracy) == (72, 2, 0.5)
    assert (found.by_prompt.low, found.by_prompt.high) == (0, 1)
    assert found.interval.high - found.interval.low < 0.25


def simulated_raters(count, temperature, seed=0):
    draw = np.random.default_rng(seed)
    gold = draw.normal(size=(count, 2))
    first = draw.random(count) < 1 / (1 + np.exp(-(gold[:, 0] - gold[:, 1]) / temperature))
    ranks = [(0, 1) if f else (1, 0) for f in first]
    return [Ranking(prompt=str(i), completions=("x", "y"), ranks=r) for i, r in enumerate(ranks)], gold.tolist()


def bayes_ceiling(gold, temperature):
    """What an oracle scores on Bradley–Terry labels: it names the better answer, raters do so σ(|Δu|/τ) often."""
    return float((1 / (1 + np.exp(-np.abs(gold) / temperature))).mean())


def test_an_oracle_reaches_the_ceiling_and_knows_the_gold_order():
    rows, gold = simulated_raters(20_000, temperature=0.7)
    pairs = pairs_of(rows, gold, [[1, 1]] * len(rows), gold)
    found = reward_accuracy(pairs, bayes_ceiling(pairs.gold, 0.7))
    assert found.truth is not None
    assert found.truth.gold_accuracy == 1
    assert found.accuracy == pytest.approx(found.truth.ceiling, abs=0.01)
    assert found.truth.share == pytest.approx(1, abs=0.03)


def test_a_coin_is_at_chance_and_no_part_of_the_way():
    rows, gold = simulated_raters(5_000, temperature=0.7)
    coin = np.random.default_rng(9).random((5_000, 2)).tolist()
    pairs = pairs_of(rows, coin, [[1, 1]] * len(rows), gold)
    found = reward_accuracy(pairs, bayes_ceiling(pairs.gold, 0.7))
    assert found.truth is not None
    assert abs(found.truth.share) < 0.06
    assert found.interval.low < 0.5 < found.interval.high


def test_a_model_that_loves_length_is_found_out():
    draw = np.random.default_rng(2)
    lengths = draw.integers(1, 60, size=(400, 2))
    rows = [preference(str(i), "a", "b") for i in range(400)]
    found = reward_accuracy(pairs_of(rows, (lengths * 0.1).tolist(), lengths.tolist()))
    assert found.length_correlation == pytest.approx(1)
    assert found.accuracy == pytest.approx(found.longer_wins)
    assert len(found.length_bins) == 5
    assert all(b.model == 1 for b in found.length_bins)
    assert sum(b.count for b in found.length_bins) == int((lengths[:, 0] != lengths[:, 1]).sum())
    assert all(one.high < other.low for one, other in zip(found.length_bins, found.length_bins[1:], strict=False))


def test_answers_of_one_length_leave_no_length_page():
    found = reward_accuracy(pairs_of([preference("p", "a", "b")], [[1, 0]], [[4, 4]]))
    assert found.length_bins == ()
    assert found.longer_wins == 0.5
    assert math.isnan(found.length_correlation)


def test_agreement():
    assert list(agreement(np.array([2.0, 0.0, -1.0]))) == [1, 0.5, 0]

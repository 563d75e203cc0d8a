"""Win rates: counting, clustering by prompt, abstention, and the judge's letters."""

import json
import math
from pathlib import Path

import pytest

from palate.evaluation.win_rate import gain, preferred, win_rate

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ppo_details.json").read_text())["judge_label_mapping"]


def test_judge_label_mapping_of_the_golden_file():
    found = [int(preferred(index, reply)) for index, reply in GOLDEN["inputs"]["cases"]]
    assert found == GOLDEN["outputs"]["ours_preferred"]


@pytest.mark.parametrize("reply", ["a", "A ", "A.", "Preferred: A", "B", ""])
def test_only_the_exact_letter_of_ours_counts(reply):
    assert not preferred(0, reply)


def test_a_judge_without_taste_gives_the_same_to_both_places():
    assert [preferred(0, "A"), preferred(1, "A")] == [True, False]
    with pytest.raises(ValueError, match="0 or 1"):
        preferred(2, "A")


def test_wins_ties_losses_and_a_tie_is_half_a_win():
    found = win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 3.0])
    assert found is not None
    assert (found.wins, found.ties, found.losses, found.abstained) == (2, 1, 1, 0)
    assert found.rate.estimate == 2.5 / 4


def test_swapping_the_sides_mirrors_the_rate_and_keeps_the_doubt():
    ours, theirs = [0.3, 0.9, 0.5, 0.8, 0.1, 0.7], [0.2, 0.4, 0.5, 0.9, 0.0, 0.3]
    one, other = win_rate(ours, theirs), win_rate(theirs, ours)
    assert one is not None
    assert other is not None
    assert one.rate.estimate == pytest.approx(1 - other.rate.estimate)
    assert one.rate.low == pytest.approx(1 - other.rate.high)
    assert one.rate.p_value == pytest.approx(other.rate.p_value)


def test_abstentions_on_either_side_are_left_out_and_counted():
    found = win_rate([1.0, math.nan, 3.0], [0.0, 1.0, math.nan])
    assert found is not None
    assert (found.wins, found.abstained) == (1, 2)
    assert win_rate([math.nan], [1.0]) is None
    assert gain([math.nan], [1.0]) is None


def test_several_answers_to_one_prompt_are_one_piece_of_evidence():
    ours, theirs = [1.0, 0.0, 1.0, 1.0] * 10, [0.5] * 40
    loose = win_rate(ours, theirs)
    grouped = win_rate(ours, theirs, prompts=[i // 4 for i in range(40)])
    assert loose is not None
    assert grouped is not None
    assert loose.rate.estimate == grouped.rate.estimate == 0.75
    assert loose.rate.low < 0.75
    assert (grouped.rate.low, grouped.rate.high) == (0.75, 0.75)


def test_gain_is_the_paired_mean_difference_by_prompt():
    found = gain([2.0, 4.0, 1.0], [1.0, 1.0, 1.0], prompts=["a", "a", "b"])
    assert found is not None
    assert found.prompts == 2
    assert found.mean.estimate == pytest.approx((2.0 + 0.0) / 2)


def test_equal_models_are_not_told_apart():
    found = win_rate([1.0] * 30, [1.0] * 30)
    assert found is not None
    assert found.ties == 30
    assert found.rate.estimate == 0.5
    assert found.rate.p_value == 1


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="as many answers"):
        win_rate([1.0], [1.0, 2.0])

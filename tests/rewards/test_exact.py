"""Exact match."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from palate.rewards.exact import Reward
from palate.rewards.reward import Answers
from palate.settings import PalateError, build

Answered = Callable[..., Answers]


def test_the_whole_completion_is_compared_without_its_white_space(answered: Answered) -> None:
    answers = answered([" warm \n", "warm!", "Warm"], columns={"answer": ["warm", "warm", "warm"]})
    assert Reward().score(answers).score_B.tolist() == [1.0, 0.0, 0.0]
    assert Reward(ignore_case=True, right=2.0, wrong=-1.0).score(answers).score_B.tolist() == [2.0, -1.0, 2.0]


def test_a_pattern_finds_the_part_that_counts(answered: Answered) -> None:
    texts = ["first #1 then #42", "#42 then #7", "no number"]
    answers = answered(texts, columns={"n": [42, 42, 42]})
    assert Reward(column="n", pattern=r"#(\d+)").score(answers).score_B.tolist() == [1.0, 0.0, 0.0]
    assert Reward(column="n", pattern=r"#(\d+)", take="first").score(answers).score_B.tolist() == [0.0, 1.0, 0.0]
    assert Reward(column="n", pattern=r"\d+$").score(answers).score_B.tolist() == [1.0, 0.0, 0.0]


def test_rows_without_a_truth_are_left_to_others(answered: Answered) -> None:
    score_B = Reward().score(answered(["a", "b"], columns={"answer": [None, "b"]})).score_B
    assert math.isnan(float(score_B[0]))
    assert float(score_B[1]) == 1.0


def test_faults_are_told(answered: Answered) -> None:
    with pytest.raises(PalateError, match=r"no column 'answr'.*Did you mean 'answer'"):
        Reward(column="answr").score(answered(["a"], columns={"answer": ["a"]}))
    with pytest.raises(PalateError, match="not a regular expression"):
        build("rewards", {"kind": "exact", "pattern": "("})

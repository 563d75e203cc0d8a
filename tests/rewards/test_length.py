"""The length penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from palate.rewards.length import Reward
from palate.rewards.reward import Answers
from palate.settings import PalateError, build

Answered = Callable[..., Answers]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"unit": "words", "at_most": 2}, [0.0, 0.0, -0.2]),
        ({"unit": "words", "at_least": 2, "at_most": 3}, [-0.1, 0.0, -0.1]),
        ({"unit": "words", "at_most": 1, "largest": 0.2}, [0.0, -0.1, -0.2]),
        ({"unit": "characters", "at_most": 5}, [0.0, -0.2, -1.0]),
    ],
)
def test_what_is_outside_the_bounds_pays(answered: Answered, settings: dict[str, Any], expected: list[float]) -> None:
    verdict = Reward(per_unit=0.1, **settings).score(answered(["three", "one two", "one two six ten"]))
    assert verdict.score_B.tolist() == pytest.approx(expected)


def test_tokens_are_the_sampled_ones(answered: Answered) -> None:
    answers = answered([[5, 6, 7, 8], [5]], end=False)
    assert Reward(at_most=1, per_unit=1.0).score(answers).score_B.tolist() == [-3.0, 0.0]


@pytest.mark.parametrize("given", [{}, {"at_least": 5, "at_most": 4}, {"at_most": 0}, {"at_most": 3, "per_unit": 0}])
def test_bounds_that_mean_nothing_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(PalateError):
        build("rewards", {"kind": "length", **given})

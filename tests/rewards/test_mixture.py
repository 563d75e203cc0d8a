"""Weighted sums of rewards."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from palate.rewards.length import Reward as Length
from palate.rewards.mixture import Reward
from palate.rewards.reward import Answers
from palate.settings import PalateError, build

Answered = Callable[..., Answers]


def test_the_score_is_the_weighted_sum_of_those_who_spoke(answered: Answered) -> None:
    def first(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [1.0, 2.0, None, None]

    def second(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [10.0, None, 30.0, None]

    verdict = Reward(rewards=(first, second), weights=(2.0, 0.5)).score(answered(["a", "b", "c", "d"]))  # pyright: ignore[reportArgumentType]
    assert verdict.score_B[:3].tolist() == [7.0, 4.0, 15.0]
    assert math.isnan(float(verdict.score_B[3]))
    assert verdict.parts["first"][:2].tolist() == [1.0, 2.0], "parts are before weighting"
    assert math.isnan(float(verdict.parts["second"][1]))


def test_per_token_and_per_answer_rewards_mix(answered: Answered) -> None:
    answers = answered([[5, 6], [7]], end=False)
    mixed = Reward(rewards=(lambda p, c: [[1, 2], [3]], lambda p, c: [4, 5]), weights=(10.0, 1.0))  # type: ignore[arg-type]
    verdict = mixed.score(answers)
    assert verdict.score_B.tolist() == [4.0, 5.0]
    assert verdict.token_reward_BT is not None
    assert verdict.token_reward_BT[answers.rollouts.action_BT].tolist() == [10.0, 20.0, 30.0]
    assert sorted(verdict.parts) == ["<lambda>", "<lambda>-2"]


def test_without_weights_each_counts_once(answered: Answered) -> None:
    one = Length(unit="characters", at_most=1, per_unit=1.0)
    assert Reward(rewards=(one, one)).score(answered(["abc"])).score_B.tolist() == [-4.0]


def test_mixtures_nest_and_faults_are_placed() -> None:
    inner = {"kind": "mixture", "rewards": [{"kind": "length", "at_most": 3}], "weights": [2]}
    assert build("rewards", {"kind": "mixture", "rewards": [inner]}).kind == "mixture"
    with pytest.raises(PalateError, match="2 weights for 1 rewards"):
        build("rewards", {**inner, "weights": [1, 2]}, "reward")
    with pytest.raises(PalateError, match=r"reward\.rewards\.0: no reward is called 'lenght'|reward.rewards.0.*lenght"):
        build("rewards", {"kind": "mixture", "rewards": [{"kind": "lenght"}]}, "reward")
    with pytest.raises(PalateError, match="at least 1 item"):
        build("rewards", {"kind": "mixture", "rewards": []}, "reward")

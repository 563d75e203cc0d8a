"""The table of metrics: every name has one meaning, and verl's names hold the same numbers."""

from __future__ import annotations

import math

import pytest

from palate.metrics import METRICS, lookup, verl_names

FIELD_NAMES = [
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/ratio_var",
    "val/num_eos_tokens",
    "eps",
    "lr",
    "episode",
    "loss",
    "entropy",
    "mean_token_accuracy",
    "accuracy",
    "margin",
    "min_reward",
    "mean_reward",
    "max_reward",
    "step_time",
    "num_tokens",
    "rewards/any_name/mean",
    "rewards/any_name/std",
]


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_the_names_users_know_have_a_meaning(name: str) -> None:
    assert lookup(name) is not None


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_says_what_it_is(name: str) -> None:
    metric = METRICS[name]
    assert metric.name == name
    assert metric.unit
    assert len(metric.meaning) > 15
    assert metric.meaning.endswith(".")
    assert metric.over
    assert metric.healthy[0] <= metric.healthy[1]


def test_a_held_out_metric_is_the_metric_on_held_out_rows() -> None:
    assert lookup("eval/accuracy") is lookup("accuracy")
    assert lookup("eval/nothing") is None
    assert lookup("objective") is None
    assert lookup("rewards/a") is None


def test_healthy_is_a_range_of_finite_numbers() -> None:
    ratio = METRICS["val/ratio"]
    assert ratio.is_healthy(1.0)
    assert not ratio.is_healthy(1.5)
    assert not ratio.is_healthy(math.nan)
    assert not METRICS["returns/mean"].is_healthy(math.inf)


def test_verl_names_hold_the_same_numbers() -> None:
    metrics = {"policy/approxkl_avg": 0.25, "response/eos_rate": 0.75, "gold/mean": 3.0}
    assert verl_names(metrics) == {"actor/ppo_kl": 0.25, "response_length/clip_ratio": 0.25}

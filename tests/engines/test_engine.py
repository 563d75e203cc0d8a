"""Sampling settings, the refusal to train on a part of the vocabulary, and the layout of rollouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from palate.engines.engine import Sampling, answers_per_prompt, lay_out, require_full_support, stop_reasons
from palate.settings import PalateError, parse


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"temperature": 0.0}, "greater than 0"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "above max_new_tokens"),
        ({"fixed_length": True, "stop_token_ids": [3]}, "never stops"),
        ({"fixed_length": True, "min_new_tokens": 3}, "never stops"),
        ({"temprature": 0.7}, "Did you mean 'temperature'"),
    ],
)
def test_a_contradiction_is_refused_at_the_door(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(PalateError, match=fault):
        parse(Sampling, given, "stages.2.sampling")


@pytest.mark.parametrize(
    ("given", "name"), [({"top_k": 5}, "top_k"), ({"top_p": 0.9}, "top_p"), ({"min_new_tokens": 2}, "min_new_tokens")]
)
def test_training_refuses_a_truncated_distribution(given: dict[str, Any], name: str) -> None:
    with pytest.raises(PalateError, match=rf"rlhf\.sampling\.{name}: .*kept mass"):
        require_full_support(Sampling(**given), "rlhf.sampling")


def test_training_accepts_temperature_stops_and_fixed_length() -> None:
    require_full_support(Sampling(temperature=0.7, stop_token_ids=(3,)), "sampling")
    require_full_support(Sampling(fixed_length=True), "sampling")


def test_keys_are_dealt_evenly() -> None:
    assert answers_per_prompt(3, 12) == 4
    with pytest.raises(ValueError, match="evenly"):
        answers_per_prompt(3, 10)


def test_rows_are_prompt_answer_padding() -> None:
    rows = lay_out(
        [[5, 6], [7]],
        [[1], [2, 3], [4, 5, 6], [0]],
        [[-0.1], [-0.2, -0.3], [-0.4, -0.5, -0.6], [-0.7]],
        [True, False, False, True],
        pad=0,
        version=3,
        temperature=0.7,
        device=torch.device("cpu"),
    )
    assert rows.tokens_BT.tolist() == [[5, 6, 1, 0], [5, 6, 2, 3], [7, 4, 5, 6], [7, 0, 0, 0]]
    assert rows.real_BT.sum(-1).tolist() == [3, 4, 4, 2]
    assert rows.action_BT.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert rows.logp_BT[2].tolist() == pytest.approx([0.0, -0.4, -0.5, -0.6])
    assert rows.prompt_B.tolist() == [0, 0, 1, 1]
    assert (rows.version, rows.temperature) == (3, 0.7)
    assert rows.length_B.tolist() == [1, 2, 3, 1]
    assert stop_reasons(rows, eos=1) == ["eos", "length", "length", "stop"]
    assert stop_reasons(rows, eos=None) == ["stop", "length", "length", "stop"]

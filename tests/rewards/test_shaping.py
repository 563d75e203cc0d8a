"""Cutting, the missing-EOS penalty, clipping and abstention."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from palate.models.tokenizer import Tokenizer
from palate.rewards.reward import Answers, Verdict
from palate.rewards.shaping import Shaping, cut_after, shape, stop_token
from palate.settings import PalateError

Answered = Callable[..., Answers]
NAN = float("nan")
GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent.parent / "golden/ppo_details.json").read_text())


def verdict(scores: list[float], tokens: torch.Tensor | None = None) -> Verdict:
    score_B = torch.tensor(scores)
    return Verdict(score_B, tokens, {"r": score_B})


@pytest.mark.parametrize(
    ("shaping", "expected"),
    [
        ({}, [3.0, 0.5]),
        ({"missing_eos_penalty": -1.0}, [3.0, -1.0]),
        ({"missing_eos_penalty": 1.0, "missing_eos": "subtract"}, [3.0, -0.5]),
        ({"score_clip": 2.0}, [2.0, 0.5]),
        ({"missing_eos_penalty": -5.0, "score_clip": 2.0}, [2.0, -2.0]),
    ],
)
def test_penalty_then_clip(answered: Answered, shaping: dict[str, Any], expected: list[float]) -> None:
    cut = answered(["a", [5, 6]])
    assert cut.rollouts.finished_B.tolist() == [True, False]
    shaped = shape(verdict([3.0, 0.5]), cut, Shaping(**shaping))
    assert shaped.score_B.tolist() == expected
    assert shaped.parts["r"].tolist() == [3.0, 0.5], "parts keep what the reward said"


def test_a_replaced_score_replaces_what_the_tokens_earned(answered: Answered) -> None:
    answers = answered(["a", [5, 6]])
    tokens = torch.ones(answers.rollouts.tokens_BT.shape) * answers.rollouts.action_BT
    replaced = shape(verdict([0.0, 0.0], tokens), answers, Shaping(missing_eos_penalty=-1.0))
    assert replaced.token_reward_BT is not None
    assert replaced.token_reward_BT.sum(-1).tolist() == [2.0, 0.0]
    taken = shape(verdict([0.0, 0.0], tokens), answers, Shaping(missing_eos_penalty=1.0, missing_eos="subtract"))
    assert taken.token_reward_BT is not None
    assert taken.token_reward_BT.sum(-1).tolist() == [2.0, 2.0]


def test_rows_nobody_judged_get_the_mean_of_the_rest(answered: Answered) -> None:
    answers = answered(["a", "b", "c"])
    assert shape(verdict([1.0, NAN, 4.0]), answers, Shaping()).score_B.tolist() == [1.0, 2.5, 4.0]
    with pytest.raises(PalateError, match="abstained on 1 of 3 answers, first on answer 1"):
        shape(verdict([1.0, NAN, 4.0]), answers, Shaping(abstained="error"))
    with pytest.raises(PalateError, match="abstained on 3 of 3"):
        shape(verdict([NAN] * 3), answers, Shaping())


def cut_golden(answered: Answered, rows: list[list[int]], *how: int) -> tuple[list[list[int]], Answers]:
    """The published rows as answers to prompts of different lengths, cut; the answer cells and the view."""
    answers = answered(rows, [f"prompt {'x' * i}" for i in range(len(rows))], end=False)
    cut = cut_after(answers.rollouts, *how)
    cells = [cut.tokens_BT[row][answers.rollouts.action_BT[row]].tolist() for row in range(len(rows))]
    return cells, replace(answers, rollouts=cut)


def test_cutting_and_replacing_as_in_the_2019_work(answered: Answered) -> None:
    case = GOLDEN["truncate_after_and_reject"]
    given, expected = case["inputs"], case["outputs"]
    how = (given["truncate_token"], given["truncate_after"], given["pad_id"])
    cells, view = cut_golden(answered, given["responses"], *how)
    assert cells == expected["postprocessed"]
    assert view.rollouts.finished_B.int().tolist() == expected["valid"]
    shaped = shape(verdict(given["rm_scores"]), view, Shaping(missing_eos_penalty=given["penalty"]))
    assert shaped.score_B.tolist() == expected["scores"]


def test_cutting_at_the_end_token_as_in_the_tldr_work(answered: Answered) -> None:
    case = GOLDEN["nplus_truncate_eos"]
    given, expected = case["inputs"], case["outputs"]
    cells, view = cut_golden(answered, given["responses"], given["eos_id"], 0, given["pad_id"])
    assert cells == expected["postprocessed"]
    assert (view.rollouts.length_B - 1).tolist() == expected["sequence_lengths"]
    assert view.rollouts.finished_B.int().tolist() == expected["contains_eos"]


def test_a_cut_answer_is_shorter_everywhere(answered: Answered, tokenizer: Tokenizer) -> None:
    answers = answered([[5, 9, 6, 9, 7], [9, 5], [5, 6, 7]], ["p", "quite long", "r"], end=False)
    rows = answers.rollouts
    cut = cut_after(rows, 9, 1, tokenizer.pad)
    assert cut.length_B.tolist() == [2, 2, 3]
    assert cut.finished_B.tolist() == [True, False, False]
    assert (cut.real_BT.sum(-1) - cut.length_B).tolist() == (rows.real_BT.sum(-1) - rows.length_B).tolist()
    assert bool((cut.real_BT >= cut.action_BT).all())
    assert cut_after(rows, 9, 0, tokenizer.pad).length_B.tolist() == [2, 1, 3]


def test_a_stop_token_is_one_token(tokenizer: Tokenizer) -> None:
    assert stop_token("eos", tokenizer) == tokenizer.eos
    assert stop_token(7, tokenizer) == 7
    assert stop_token(".", tokenizer) == tokenizer.encode(".")[0]
    with pytest.raises(PalateError, match=r"truncation.token: 'zq' is 2 tokens"):
        stop_token("zq", tokenizer, "truncation.token")
    with pytest.raises(PalateError, match="no token 100000"):
        stop_token(100000, tokenizer)

"""Reward functions: what they are given, what they may return, and how their faults are told."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palate.models.tokenizer import Tokenizer
from palate.rewards.function import Reward
from palate.rewards.reward import Answers, Verdict
from palate.settings import PalateError, build

Answered = Callable[..., Answers]


def score(function: Any, answers: Answers) -> Verdict:
    return Reward(function=function).score(answers)


def test_a_function_is_called_once_with_everything_it_asks_for(answered: Answered) -> None:
    calls: list[tuple[Any, ...]] = []

    def reward(prompts: list[str], completions: list[str], truth: list[str]) -> list[float]:
        calls.append((prompts, completions, truth))
        return [float(c == t) for c, t in zip(completions, truth, strict=True)]

    verdict = score(reward, answered(["a", "b"], ["p", "q"], {"truth": ["a", "x"], "other": [1, 2]}))
    assert calls == [(["p", "q"], ["a", "b"], ["a", "x"])]
    assert verdict.score_B.tolist() == [1.0, 0.0]
    assert verdict.token_reward_BT is None
    assert list(verdict.parts) == ["reward"]


def test_other_parameter_names_get_prompts_and_completions_by_place(answered: Answered) -> None:
    def reward(questions: list[str], replies: list[str], **rest: Any) -> list[float]:
        assert sorted(rest) == ["truth"]
        return [len(q) + 10.0 * len(r) for q, r in zip(questions, replies, strict=True)]

    assert score(reward, answered(["aa"], ["q"], {"truth": [1]})).score_B.tolist() == [21.0]


def test_completions_alone_as_in_trl(answered: Answered) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        assert kwargs["prompts"] == ["p"]
        return [1.0]

    assert score(reward, answered(["a"], ["p"])).score_B.tolist() == [1.0]


def test_ids_and_endings_for_those_who_name_them(answered: Answered, tokenizer: Tokenizer) -> None:
    def reward(prompts: Any, completions: Any, prompt_ids: Any, completion_ids: Any, finished: Any) -> list[float]:
        assert prompt_ids == [tokenizer.encode("p")]
        assert completion_ids == [[*tokenizer.encode("a"), tokenizer.eos]]
        assert finished == [True]
        return [0.0]

    score(reward, answered(["a"], ["p"]))


def test_the_data_cannot_be_changed_by_the_function(answered: Answered) -> None:
    def vandal(prompts: list[str], completions: list[str], tags: list[dict[str, int]]) -> list[float]:
        prompts.clear()
        tags[0]["k"] = 99
        tags.append({})
        return [0.0, 0.0]

    answers = answered(["a", "b"], ["p", "q"], {"tags": [{"k": 1}, {"k": 2}]})
    score(vandal, answers)
    assert answers.columns == {"tags": [{"k": 1}, {"k": 2}]}
    assert answers.prompts == ["p", "q"]


def test_an_async_function_is_awaited_inside_and_outside_a_loop(answered: Answered) -> None:
    async def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return list(await asyncio.gather(*(later(c) for c in completions)))

    async def later(text: str) -> float:
        await asyncio.sleep(0)
        return float(len(text))

    async def notebook() -> Verdict:
        return score(reward, answers)

    answers = answered(["a", "bb"])
    assert score(reward, answers).score_B.tolist() == [1.0, 2.0]
    assert asyncio.run(notebook()).score_B.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "given", [[1, True], (1.0, 1.0), np.array([1.0, 1.0]), torch.ones(2), [np.float32(1), torch.tensor(1.0)]]
)
def test_numbers_of_any_make_are_numbers(answered: Answered, given: Any) -> None:
    assert score(lambda p, c: given, answered(["a", "b"])).score_B.tolist() == [1.0, 1.0]


def test_none_abstains(answered: Answered) -> None:
    verdict = score(lambda p, c: [None, 2.0], answered(["a", "b"]))
    assert math.isnan(float(verdict.score_B[0]))
    assert float(verdict.score_B[1]) == 2.0


def test_numbers_per_token_land_on_the_sampled_tokens(answered: Answered) -> None:
    """Answers of different lengths: number i of a list is the reward of answer token i, nothing elsewhere."""
    answers = answered([[7, 8, 9], [5], [6, 4]], ["long prompt", "p", "q"], end=False)
    verdict = score(lambda p, c: [[1, 2, 3], [4.0], None], answers)
    assert verdict.token_reward_BT is not None
    for row, expected in enumerate(([1.0, 2.0, 3.0], [4.0], [0.0, 0.0])):
        mask = answers.rollouts.action_BT[row]
        assert verdict.token_reward_BT[row][mask].tolist() == expected
        assert float(verdict.token_reward_BT[row][~mask].abs().sum()) == 0.0
    assert verdict.score_B[:2].tolist() == [0.0, 0.0]
    assert math.isnan(float(verdict.score_B[2]))
    assert next(iter(verdict.parts.values()))[:2].tolist() == [6.0, 4.0]


def explode(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0 / (len(c) - 2) for c in completions]


async def explode_later(prompts: list[str], completions: list[str]) -> list[float]:
    return explode(prompts, completions)


@pytest.mark.parametrize("function", [explode, explode_later])
def test_an_exception_names_the_answer_that_causes_it(answered: Answered, function: Any) -> None:
    answers = answered(["a", "bb", "c"], ["first question", "second question " * 9, "third"])
    with pytest.raises(
        PalateError, match=rf"{function.__name__}: .*ZeroDivisionError.*test_function.py:\d+.*answer 1 .*'second"
    ):
        score(function, answers)


def test_an_exception_of_no_single_answer_names_them_all(answered: Answered) -> None:
    def needs_one(prompts: list[str], completions: list[str]) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(PalateError, match=r"too many.*2 answers together, the first being answer 0"):
        score(needs_one, answered(["a", "b"]))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ([1.0], "returned 1 results for 2 answers"),
        ([1.0, 2.0, 3.0], "returned 3 results for 2 answers"),
        (0.5, "returned float, not a list"),
        (None, "returned NoneType, not a list"),
        ({"a": 1}, "returned dict, not a list"),
        ([1.0, "good"], "'good' for answer 1 .*not a finite number"),
        ([float("nan"), 1.0], "nan for answer 0 .*not a finite number"),
        ([1.0, float("inf")], "inf for answer 1"),
        ([1.0, [1.0]], "1 numbers for the 2 tokens of answer 1"),
        ([1.0, [1.0, None]], "None for answer 1"),
        ([1.0, 1j], "1j for answer 1"),
        ([1.0, 1e39], r"1e\+39 for answer 1"),
        ([10**5000, 1.0], "a huge number for answer 0"),
        ([1.0, [[1.0, 2.0], 1.0]], r"\[1\.0, 2\.0\] for answer 1"),
    ],
)
def test_a_wrong_result_is_told_and_placed(answered: Answered, given: Any, fault: str) -> None:
    with pytest.raises(PalateError, match=fault):
        score(lambda p, c: given, answered(["a", "b"]))


def test_a_column_that_is_not_there_is_named(answered: Answered) -> None:
    def reward(completions: list[str], anwser: list[str]) -> list[float]:
        return [0.0]

    with pytest.raises(PalateError, match=r"asks for 'anwser'.*Did you mean 'answer'"):
        score(reward, answered(["a"], ["p"], {"answer": ["x"]}))


def test_a_function_is_found_by_module_or_by_file(
    answered: Answered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_taste.py").write_text(
        "def warm(prompts, completions):\n    return [float('warm' in c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    answers = answered(["so warm", "so cold"])
    for spelled in ("my_taste:warm", "my_taste.py:warm", f"{tmp_path}/my_taste.py:warm"):
        assert score(spelled, answers).score_B.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("spelled", "fault"),
    [
        ("nothing", "write module:function"),
        ("no_such_module:f", "cannot import no_such_module: ModuleNotFoundError"),
        ("no/such/file.py:f", "no such file"),
        ("math:sqroot", r"math has no 'sqroot'. Did you mean 'sqrt'"),
        ("math:pi", "pi is float, not a function"),
    ],
)
def test_a_function_that_is_not_there_stops_the_run_at_the_door(spelled: str, fault: str) -> None:
    with pytest.raises(PalateError, match=fault):
        build("rewards", {"kind": "function", "function": spelled}, "reward")


def test_a_function_or_module_that_exits_is_an_error_and_not_an_exit(answered: Answered, tmp_path: Path) -> None:
    def leaves(prompts: list[str], completions: list[str]) -> list[float]:
        raise SystemExit("bye")

    with pytest.raises(PalateError, match="raised SystemExit: bye"):
        score(leaves, answered(["a"]))
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(PalateError, match="SystemExit"):
        build("rewards", {"kind": "function", "function": f"{tmp_path}/script.py:f"}, "reward")


def test_a_module_that_breaks_on_import_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(PalateError, match="ZeroDivisionError"):
        build("rewards", {"kind": "function", "function": f"{tmp_path}/broken.py:f"}, "reward")

"""A process reward model: where steps end, and each step's score there as a per-token reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from palate.cast import Cast
from palate.models.load import load
from palate.models.tokenizer import Tokenizer, train_bpe
from palate.rewards.model import Reward
from palate.rewards.reward import Answers
from palate.rewards.steps import step_ends
from palate.settings import PalateError
from tests.rewards.test_model import judge, read_last

Answered = Callable[..., Answers]


def steps(answers: Answers, tokenizer: Tokenizer, separator: str = "\n") -> list[list[str]]:
    """The text of each answer up to each of its step ends."""
    rows, found = answers.rollouts, list[list[str]]()
    ends = step_ends(rows, tokenizer, separator)
    assert not (ends & ~rows.action_BT).any()
    for i in range(rows.size):
        columns = ends[i].nonzero()[:, 0].tolist()
        upto = [rows.tokens_BT[i][: c + 1][rows.action_BT[i][: c + 1]].tolist() for c in columns]
        found.append([tokenizer.decode(ids) for ids in upto])
    return found


def test_steps_end_before_the_separator(answered: Answered, tokenizer: Tokenizer) -> None:
    answers = answered(["one\ntwo\nthree", "one", "\n\none\n\n", "one##two"])
    assert steps(answers, tokenizer)[:3] == [["one", "one\ntwo", "one\ntwo\nthree"], ["one"], ["\n\none"]]
    assert steps(answers, tokenizer, "##")[3] == ["one", "one##two"]
    unended = answered(["one\ntwo"], end=False)
    assert steps(unended, tokenizer) == [["one", "one\ntwo"]]


def test_a_token_that_holds_the_end_of_a_step_and_the_separator_is_the_steps(answered: Answered) -> None:
    merged = train_bpe(["a.\nb.\nc.\n"] * 9, 270)
    ids = merged.encode("a.\nb")
    assert any("." in merged.decode([t]) and "\n" in merged.decode([t]) for t in ids), "the test needs such a token"
    found = steps(answered([ids], end=False), merged)
    assert found[0][0].startswith("a.")
    assert len(found[0]) == 2


def test_each_step_is_scored_at_its_last_token(
    answered: Answered, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cast, "budget", 1)  # a row at a time
    folder = judge(tmp_path, tokenizer)
    prompts = ["Why?", "A longer question, is it?"]
    answers = answered(["warm\nsweet", "round"], prompts)
    verdict = Reward(model=str(folder), step_separator="\n").score(answers)
    loaded = load(folder, "reward")
    tokens = verdict.token_reward_BT
    assert tokens is not None
    for row, texts in enumerate([["warm", "warm\nsweet"], ["round"]]):
        whole = answers.ids(row)
        prompt = tokenizer.encode(prompts[row])
        lengths = [len(tokenizer.encode(text)) for text in texts]
        expected = [read_last(loaded, [*prompt, *whole[:n]]) for n in lengths]
        given = tokens[row][tokens[row] != 0].tolist()
        assert given == pytest.approx(expected, abs=1e-5)
        assert float(verdict.parts["model"][row]) == pytest.approx(sum(expected), abs=1e-5)
    assert verdict.score_B.tolist() == [0.0, 0.0]


def test_another_tokenizer_has_no_steps(answered: Answered, tmp_path: Path) -> None:
    other = train_bpe(["entirely different words make entirely different merges"], 300)
    with pytest.raises(PalateError, match=r"step_separator: .* has another tokenizer than the policy"):
        Reward(model=str(judge(tmp_path, other)), step_separator="\n").score(answered(["a"]))

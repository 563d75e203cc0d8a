"""A reward model as the reward, against one unpadded row at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from palate.cast import Cast
from palate.models.heads import fresh_head
from palate.models.load import Loaded, load
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.models.tokenizer import Tokenizer, train_bpe
from palate.models.trunk import Trunk
from palate.records import Message
from palate.rewards.model import Reward
from palate.rewards.reward import Answers
from palate.rewards.shaping import cut_after
from palate.settings import PalateError

Answered = Callable[..., Answers]
TEXTS = ["What is the taste of it? It is warm, round and a little sweet."]
PROMPTS = ["What is it?", "A much longer question about the taste of it, is it warm?", "And"]
NOTES = [" It is warm.", " sweet", " It is round and a little sweet, a little warm"]


def judge(folder: Path, tokenizer: Tokenizer, context: int = 96, trained: bool = True) -> Path:
    """A random reward model with gain 2 and bias −1, on disk."""
    settings = Make(hidden_size=32, layers=2, heads=2, context=context, vocabulary=320)
    body = make(settings, TEXTS, key=11).trunk.model
    head = fresh_head(32, "reference", key=3)
    head.trained = trained
    with torch.no_grad():
        head.gain.fill_(2.0)
        head.bias.fill_(-1.0)
    body.resize_token_embeddings(tokenizer.size)
    save(folder / "rm", Trunk(body, tokenizer.size), tokenizer, Card("rm", "none"), head)
    return folder / "rm"


@torch.no_grad()
def read_last(loaded: Loaded, ids: list[int]) -> float:
    """gain · head(hidden of the last token) + bias of one unpadded row, by transformers' own forward."""
    assert loaded.head is not None
    body: Any = loaded.trunk.base
    hidden_D = body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return float(loaded.head.last(hidden_D)[0] * 2.0 - 1.0)


@pytest.mark.parametrize("budget", [1, 30, 4096])
def test_the_same_tokenizer_reads_the_sampled_ids(
    answered: Answered, tokenizer: Tokenizer, tmp_path: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also ids that the text would not encode to: what was sampled is what is read."""
    folder = judge(tmp_path, tokenizer)
    loaded = load(folder, "reward")
    split = [tokenizer.encode(letter)[0] for letter in "warm"]
    answers = answered([*NOTES, split], [*PROMPTS, "Q"])
    assert tokenizer.encode(answers.completions[3]) != split, "the test needs ids that re-encoding would change"
    monkeypatch.setattr(Cast, "budget", budget)
    verdict = Reward(model=str(folder)).score(answers)
    rows = answers.rollouts
    expected = [read_last(loaded, rows.tokens_BT[i][rows.real_BT[i]].tolist()) for i in range(4)]
    assert verdict.score_B.tolist() == pytest.approx(expected, abs=1e-5)
    assert list(verdict.parts) == ["model"]


def test_a_cut_answer_is_scored_where_it_was_cut(answered: Answered, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = judge(tmp_path, tokenizer)
    answers = answered([[5, 6, 9, 7, 7, 7], [5, 6, 7]], ["p", "q"], end=False)
    whole = Reward(model=str(folder)).score(answers).score_B
    view = replace(answers, rollouts=cut_after(answers.rollouts, 9, 0, tokenizer.pad))
    cut = Reward(model=str(folder)).score(view).score_B
    expected = read_last(load(folder, "reward"), [*tokenizer.encode("p"), 5, 6, 9])
    assert float(cut[0]) == pytest.approx(expected, abs=1e-5)
    assert float(cut[0]) != pytest.approx(float(whole[0]), abs=1e-3)
    assert float(cut[1]) == pytest.approx(float(whole[1]), abs=1e-5)


def test_another_tokenizer_reads_the_text(answered: Answered, tmp_path: Path) -> None:
    """Prompt and answer are encoded apart, with the reward model's own EOS where the answer had ended."""
    other = train_bpe(["entirely different words make entirely different merges"], 300)
    folder = judge(tmp_path, other)
    loaded = load(folder, "reward")
    for end in (True, False):
        answers = answered(NOTES, PROMPTS, end=end)
        verdict = Reward(model=str(folder)).score(answers)
        closing = [other.end] if end else []
        texts = zip(PROMPTS, NOTES, strict=True)
        expected = [read_last(loaded, [*other.encode(p), *other.encode(c), *closing]) for p, c in texts]
        assert verdict.score_B.tolist() == pytest.approx(expected, abs=1e-5)


def test_another_tokenizer_reads_conversations_by_its_own_template(answered: Answered, tmp_path: Path) -> None:
    other = train_bpe(["entirely different words make entirely different merges"], 300)
    folder = judge(tmp_path, other)
    said = [(Message("user", p),) for p in PROMPTS]
    verdict = Reward(model=str(folder)).score(answered(NOTES, PROMPTS, said=said))
    turns = [(*s, Message("assistant", c)) for s, c in zip(said, NOTES, strict=True)]
    rendered = [other.render(t, add_generation_prompt=False) for t in turns]
    invitations = [other.render(s, add_generation_prompt=True) for s in said]
    expected = [
        read_last(load(folder, "reward"), [*other.encode(i), *other.encode(r.removeprefix(i))])
        for i, r in zip(invitations, rendered, strict=True)
    ]
    assert verdict.score_B.tolist() == pytest.approx(expected, abs=1e-5)


def test_an_answer_without_a_word_is_still_scored(answered: Answered, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = train_bpe(["entirely different words make entirely different merges"], 300)
    answers = answered([[tokenizer.end], [tokenizer.pad], [5]], ["p", "q", "r"], end=False)
    scores = Reward(model=str(judge(tmp_path, other))).score(answers).score_B
    assert bool(scores.isfinite().all())


def test_what_cannot_be_scored_is_named(answered: Answered, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(PalateError, match="no trained reward head"):
        Reward(model=str(judge(tmp_path / "a", tokenizer, trained=False))).score(answered(["a"]))
    with pytest.raises(PalateError, match="no such folder"):
        Reward(model=str(tmp_path / "nowhere" / "at" / "all")).score(answered(["a"]))
    small = judge(tmp_path / "b", tokenizer, context=16)
    with pytest.raises(PalateError, match=r"answer 1 .* has \d+ tokens with its answer.* context is 16"):
        Reward(model=str(small)).score(answered(["a", "warm " * 20]))


def test_scores_that_are_not_numbers_stop_the_run(answered: Answered, tokenizer: Tokenizer, tmp_path: Path) -> None:
    reward = Reward(model=str(judge(tmp_path, tokenizer)), name="taste")
    loaded = reward._open()
    assert loaded.head is not None
    with torch.no_grad():
        loaded.head.bias.fill_(float("nan"))
    with pytest.raises(PalateError, match=r"reward taste: .* gives nan to answer 0"):
        reward.score(answered(["a"]))

"""An ensemble of real reward models: what each says, how far they are apart, and what is made of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from palate.metrics import lookup
from palate.models.heads import fresh_head
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.models.tokenizer import Tokenizer
from palate.models.trunk import Trunk
from palate.rewards import model
from palate.rewards.ensemble import Reward, pessimistic
from palate.rewards.reward import Answers, resolve, stages_read
from palate.settings import PalateError, build
from palate.stages._seats import judges

Answered = Callable[..., Answers]
NOTES = [" It is warm.", " sweet", " It is round and a little sweet"]


@pytest.fixture(scope="module")
def members(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random reward models of one family."""
    folder, found = tmp_path_factory.mktemp("ensemble"), list[Path]()
    for number in range(3):
        body = make(Make(hidden_size=16, layers=1, heads=2, context=96, vocabulary=320), NOTES, key=number).trunk.model
        body.resize_token_embeddings(tokenizer.size)
        head = fresh_head(16, "reference", key=number)
        head.trained = True
        with torch.no_grad():
            head.gain.fill_(2.0)
        save(folder / str(number), Trunk(body, tokenizer.size), tokenizer, Card("rm", "none"), head)
        found.append(folder / str(number))
    return found


def alone(members: list[Path], answers: Answers) -> list[list[float]]:
    """What each member says by itself, per answer."""
    said = [model.Reward(model=str(folder)).score(answers).score_B.tolist() for folder in members]
    return [list(row) for row in zip(*said, strict=True)]


@pytest.mark.parametrize("pessimism", [0.0, 1.0, 2.5])
def test_the_score_is_the_mean_less_the_spread(answered: Answered, members: list[Path], pessimism: float) -> None:
    answers = answered(NOTES)
    verdict = Reward(models=tuple(map(str, members)), pessimism=pessimism).score(answers)
    each = alone(members, answers)
    assert min(statistics.pstdev(row) for row in each) > 1e-3
    hand = [statistics.fmean(row) - pessimism * statistics.pstdev(row) for row in each]
    assert verdict.score_B.tolist() == pytest.approx(hand, abs=1e-5)
    assert verdict.parts["ensemble"].equal(verdict.score_B)
    assert verdict.parts["ensemble/spread"].tolist() == pytest.approx([statistics.pstdev(r) for r in each], abs=1e-5)
    for n in range(3):
        assert verdict.parts[f"ensemble/{n}"].tolist() == pytest.approx([row[n] for row in each], abs=1e-6)
    metrics = [f"rewards/{part}/mean" for part in verdict.parts]
    assert all(lookup(metric) for metric in metrics)


def test_the_lowest_member(answered: Answered, members: list[Path]) -> None:
    answers = answered(NOTES)
    verdict = Reward(models=tuple(map(str, members)), combine="min", name="wary").score(answers)
    assert verdict.score_B.tolist() == pytest.approx([min(row) for row in alone(members, answers)], abs=1e-6)
    assert "wary/spread" in verdict.parts


def test_members_that_agree_cost_nothing_and_one_that_abstains_silences_the_row() -> None:
    same = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert pessimistic(same, 5.0).tolist() == [1.0, 2.0]
    assert pessimistic(torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), 1.0).isnan().tolist() == [False, True]


def test_sabotaged_scores_are_told_apart(answered: Answered, members: list[Path]) -> None:
    """A spread added, dropped, or taken as the sample's would be seen by the first test of this file."""
    score_NB = torch.tensor(alone(members, answered(NOTES))).T
    right = pessimistic(score_NB, 1.0)
    for wrong in (pessimistic(score_NB, -1.0), score_NB.mean(0), score_NB.mean(0) - score_NB.std(0)):
        assert float((wrong - right).abs().min()) > 1e-4


def test_it_is_a_kind_that_reads_stages(answered: Answered, members: list[Path]) -> None:
    given = build("rewards", {"kind": "ensemble", "models": ["stage:a", "stage:b"]})
    assert isinstance(given, Reward)
    assert sorted(stages_read(given)) == ["a", "b"]
    assert sorted(judges(given)) == ["stage:a", "stage:b"]
    found = resolve(given, lambda name: members[0] if name == "stage:a" else members[1])
    assert found.score(answered(NOTES)).score_B.shape == (3,)
    with pytest.raises(ValueError, match="at least 2"):
        Reward(models=("stage:a",))
    dense = Reward(models=(str(members[0]), lambda completions, **_: [[1.0] for _ in completions]))
    with pytest.raises(PalateError, match="a member speaks per token"):
        dense.score(answered([[5], [6]], end=False))

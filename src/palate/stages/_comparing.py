"""From judged answers to an outcome: summaries of each model, duels with the baseline, reward models on comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from palate.data.source import Data
from palate.evaluation import text
from palate.evaluation.outcome import ModelOutcome, Score
from palate.evaluation.reward_accuracy import RewardAccuracy, pairs_of, reward_accuracy
from palate.evaluation.statistics import Interval, bootstrap_mean
from palate.evaluation.win_rate import gain, win_rate
from palate.records import Ranking
from palate.rewards.reward import Answers, Scorer
from palate.stages._answering import Said

_NOISE = ("temperature", "position_bias")
"""The options of a world's comparisons that its ceiling depends on."""


def model_outcome(said: Said, baseline: Said, world: str | None, rouge: bool, seed: int) -> ModelOutcome:
    """One model in numbers, its duels against the baseline's answers to the same prompts."""
    rivals = {} if said is baseline else baseline.scores
    duels = {
        name: win_rate(said.scores[name], theirs, said.owners, (seed, "win rate", name))
        for name, theirs in rivals.items()
    }
    gains = {
        name: gain(said.scores[name], theirs, said.owners, (seed, "gain", name)) for name, theirs in rivals.items()
    }
    return ModelOutcome(
        scores={name: found for name, scores in said.scores.items() if (found := _score(scores, said.owners, seed))},
        win_rate={name: duel for name, duel in duels.items() if duel},
        gain={name: found for name, found in gains.items() if found},
        kl=said.kl,
        text=text.summarise(said.completions, said.lengths, said.finished),
        rouge=text.rouge(said.completions, said.references) if rouge else None,
        world=describe(world, said.prompts, said.completions),
    )


def _score(scores: Sequence[float], owners: Sequence[int], seed: int) -> Score | None:
    known = [(s, owner) for s, owner in zip(scores, owners, strict=True) if not math.isnan(s)]
    if not known:
        return None
    by_prompt: dict[int, list[float]] = {}
    for score, owner in known:
        by_prompt.setdefault(owner, []).append(score)
    mean = bootstrap_mean([sum(v) / len(v) for v in by_prompt.values()], (seed, "score"))
    deviation = float(np.std([s for s, _ in known]))
    return Score(Interval(mean.estimate, mean.low, mean.high), deviation, len(scores) - len(known))


def world_of(data: Data | None) -> str | None:
    """The world a source of data comes from, when it comes from one alone."""
    parts = data.parts() if data else ()
    if len(parts) != 1 or not parts[0].path.startswith("world:"):
        return None
    return parts[0].path.removeprefix("world:").partition("/")[0]


def describe(world: str | None, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, float]:
    """What a world says of answers to its prompts; nothing without a world."""
    if world is None:
        return {}
    told = getattr(import_module(f"palate.worlds.{world}"), "describe", None)  # not every world has parts to tell of
    return told(list(zip(prompts, completions, strict=True))) if told else {}


def ceiling(data: Data, rankings: Sequence[Ranking]) -> float | None:
    """The Bayes accuracy that a world's raters leave possible on these comparisons; None without a world."""
    world = world_of(data)
    if world is None:
        return None
    noise = {name: value for name, value in data.parts()[0].options.items() if name in _NOISE}
    return import_module(f"palate.worlds.{world}").ceiling(rankings, **noise).bayes


def judge_rewards(
    rewards: Mapping[str, Scorer],
    gold: str | None,
    rankings: Sequence[Ranking],
    answers: Answers,
    data: Data,
    seed: int,
) -> Iterator[tuple[str, RewardAccuracy]]:
    """Every reward but gold, held against the comparisons; one that abstained throughout is left out."""
    lengths = _by_ranking(rankings, answers.rollouts.length_B.tolist())
    truth = _by_ranking(rankings, rewards[gold].score(answers).score_B.tolist()) if gold else None
    best = ceiling(data, rankings)
    for name, reward in rewards.items():
        if name != gold:
            scores = _by_ranking(rankings, reward.score(answers).score_B.tolist())
            pairs = pairs_of(rankings, scores, lengths, truth)
            if pairs.score.size:
                yield name, reward_accuracy(pairs, best, (seed, "reward accuracy", name))


def _by_ranking(rankings: Sequence[Ranking], flat: Sequence[float]) -> list[list[float]]:
    values = iter(flat)
    return [[next(values) for _ in ranking.completions] for ranking in rankings]


def sample_rows(said: Mapping[str, Said], world: str | None) -> list[dict[str, Any]]:
    """The first answer of every model to every prompt, side by side, with its scores and the world's parts."""
    first = next(iter(said.values()))
    starts = [i for i, owner in enumerate(first.owners) if i == 0 or owner != first.owners[i - 1]]
    return [_sample_row(said, i, world) for i in starts]


def _sample_row(said: Mapping[str, Said], i: int, world: str | None) -> dict[str, Any]:
    models = said.items()
    row: dict[str, Any] = {
        "prompt": next(iter(said.values())).prompts[i],
        "completions": {name: one.completions[i] for name, one in models},
        "scores": {name: {r: _known(scores[i]) for r, scores in one.scores.items()} for name, one in models},
    }
    if world:
        row["parts"] = {n: describe(world, [one.prompts[i]], [one.completions[i]]) for n, one in models}
    return row


def _known(score: float) -> float | None:
    return None if math.isnan(score) else score

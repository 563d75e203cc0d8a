"""A weighted sum of rewards."""

from __future__ import annotations

from collections import Counter
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from palate.rewards.reward import Answers, AnyReward, Verdict
from palate.settings import Choice


class Reward(Choice):
    """Σ wᵢ · rewardᵢ, per answer and per token.

    A reward that abstains on a row is left out of that row's sum (its weight is not given to the others); a
    row on which all abstain has no score.
    """

    kind: str = "mixture"
    """A weighted sum of rewards."""
    rewards: tuple[AnyReward, ...] = Field(min_length=1)
    """The rewards: mappings with `kind`, or (from Python) functions."""
    weights: tuple[float, ...] = ()
    """One weight per reward; empty gives each the weight 1."""

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.weights)} weights for {len(self.rewards)} rewards; give one per reward")
        return self

    @property
    def label(self) -> str:
        """Always `mixture`."""
        return "mixture"

    def score(self, answers: Answers) -> Verdict:
        """The weighted sum; `parts` holds every reward before weighting, the n-th of one name as `name-n`."""
        verdicts = [reward.score(answers) for reward in self.rewards]
        weights = self.weights or (1.0,) * len(verdicts)
        score_B = _weighted([v.score_B for v in verdicts], weights)
        dense = [(v.token_reward_BT, w) for v, w in zip(verdicts, weights, strict=True)]
        token_BT = sum((w * t for t, w in dense if t is not None), start=torch.zeros(()))
        return Verdict(score_B, token_BT if token_BT.dim() else None, _named_apart(verdicts))


def _weighted(scores: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Σ wᵢ sᵢ over the rewards that spoke; nan where none did."""
    score_NB = torch.stack(scores)
    weight_N1 = torch.tensor(weights, dtype=score_NB.dtype, device=score_NB.device)[:, None]
    silent_NB = score_NB.isnan()
    total_B = (weight_N1 * score_NB.masked_fill(silent_NB, 0.0)).sum(0)
    return total_B.masked_fill(silent_NB.all(0), float("nan"))


def _named_apart(verdicts: list[Verdict]) -> dict[str, Tensor]:
    seen: Counter[str] = Counter()
    parts: dict[str, Tensor] = {}
    for verdict in verdicts:
        for name, part_B in verdict.parts.items():
            seen[name] += 1
            parts[name if seen[name] == 1 else f"{name}-{seen[name]}"] = part_B
    return parts

"""Several reward models as one reward that is wary where they disagree."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from palate.rewards.reward import Answers, AnyReward, Scorer, Verdict
from palate.settings import Choice, PalateError


class Reward(Choice):
    """mean − λ · spread of several reward models, or the lowest of them.

    A policy finds the answers that one model overrates; models that differ in seed or data seldom overrate the same
    ones, so their disagreement marks them (Coste et al. 2023, 2310.02743; Eisenstein et al. 2023, 2312.09244).
    """

    kind: str = "ensemble"
    """Several reward models as one."""
    models: tuple[AnyReward, ...] = Field(min_length=2)
    """The members: folders, hub ids or stage:NAME, or mappings with `kind`; their scores should share one scale."""
    pessimism: float = Field(default=1.0, ge=0)
    """λ: how many standard deviations over the members are taken off their mean; 0 is the plain mean."""
    combine: Literal["mean", "min"] = "mean"
    """`mean`: mean − λ · spread. `min`: the lowest member, whatever λ is."""
    name: str = ""
    """What tables and metrics call it; empty is `ensemble`."""

    @property
    def label(self) -> str:
        """The given name, or `ensemble`."""
        return self.name or "ensemble"

    @property
    def rewards(self) -> tuple[Scorer, ...]:
        """The members, under the name by which whoever looks for models inside rewards finds them."""
        return self.models

    def score(self, answers: Answers) -> Verdict:
        """One score per answer; `parts` holds the score, each member as LABEL/0, LABEL/1 … and LABEL/spread.

        Raises PalateError for a member that speaks per token. A row on which a member abstains has no score.
        """
        verdicts = [member.score(answers) for member in self.models]
        if any(one.token_reward_BT is not None for one in verdicts):
            raise PalateError(f"reward {self.label}: a member speaks per token. Take members that score whole answers.")
        score_NB = torch.stack([one.score_B for one in verdicts])
        score_B = score_NB.amin(0) if self.combine == "min" else pessimistic(score_NB, self.pessimism)
        members = {f"{self.label}/{n}": one_B for n, one_B in enumerate(score_NB)}
        spread = {f"{self.label}/spread": spread_of(score_NB)}
        return Verdict(score_B, None, {self.label: score_B, **members, **spread})


def spread_of(score_NB: Tensor) -> Tensor:
    """Population standard deviation over N members, per answer; nan where a member abstained."""
    return score_NB.std(0, correction=0)


def pessimistic(score_NB: Tensor, pessimism: float) -> Tensor:
    """mean − λ · spread over N members, per answer. Coste et al. 2023 (2310.02743), uncertainty-weighted: λ · variance.

    Here the spread is the standard deviation, so that λ has no unit and the score keeps the members' scale.
    """
    return score_NB.mean(0) - pessimism * spread_of(score_NB)

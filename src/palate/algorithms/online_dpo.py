"""Direct preference optimisation on the policy's own answers, each pair labelled as soon as it is scored."""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from palate import losses
from palate.algorithms import _graded, _pairs
from palate.batches import Duels, Loss, Pairs, Scored, Term
from palate.cast import Cast
from palate.losses import widen
from palate.randomness import key, uniforms
from palate.settings import Choice


class Algorithm(Choice):
    """Online DPO (Guo et al. 2024, 2402.04792): the loss of DPO or IPO on pairs of fresh answers to one prompt.

    Labels by Bradley–Terry, soft or sampled, make π_ref · exp(r / (label_temperature · β)) the optimum of sigmoid,
    whatever pairs are met. In micro-batches a row is a pair, so two answers.
    """

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ("reference",)
    learns: ClassVar[type[Duels]] = Duels

    kind: str = "online_dpo"
    """Direct preference optimisation on the policy's own answers."""
    num_generations: _graded.Group = 2
    """Answers sampled per prompt, at least 2."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Which of more than two answers meet: the best scored and the worst, or each and every other."""
    label: Literal["soft", "sampled", "argmax"] = "soft"
    """Who wins: both, by their Bradley–Terry odds; one drawn by these odds; or always the better scored (biased)."""
    label_temperature: float = Field(default=1.0, gt=0)
    """What differences of score are divided by before they are log-odds; 1 for a reward model's own scores."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """The loss of a pair: DPO's −log σ, or IPO's squared distance."""
    beta: float = Field(default=0.1, gt=0)
    """β: what a nat of distance to the reference costs, in units of reward; IPO's τ."""
    logp_reduce: Literal["auto", "sum", "mean"] = "auto"
    """An answer's log-probability: summed over its tokens, or per token. auto: per token for ipo."""
    num_iterations: int = Field(default=1, ge=1)
    """Passes over one rollout."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Optimiser steps in one pass; each takes its share of a fresh permutation of the pairs."""

    @property
    def group(self) -> int:
        """Answers sampled per prompt."""
        return self.num_generations

    @property
    def passes(self) -> int:
        """Passes over one rollout."""
        return self.num_iterations

    @property
    def minibatches(self) -> int:
        """Optimiser steps in one pass."""
        return self.num_mini_batches

    def warnings(self) -> list[str]:
        """What hard labels do."""
        if self.label != "argmax":
            return []
        return [
            "label argmax is Bradley–Terry at an infinite scale of reward: the better answer always wins, however "
            "little scores differ, so the policy ends at the best answer alone. label: soft or sampled is unbiased."
        ]

    def memory(self) -> dict[str, float]:
        """Nothing is remembered."""
        return {}

    def prepare(self, cast: Cast, scored: Scored) -> Duels:
        """Pairs with labels and the reference's log-probabilities; no gradient."""
        rows = scored.rollouts
        heard = _graded.hear(cast, rows, True, "sampled")
        earned_B = widen(_graded.earned(scored))
        pair_RK, probability_R = self._judged(self._meetings(earned_B), earned_B, scored.key)
        margin_R = earned_B[pair_RK[:, 0]] - earned_B[pair_RK[:, 1]]
        said = (rows.tokens_BT.masked_fill(~rows.real_BT, -1))[pair_RK]
        return Duels(
            tokens_BKT=rows.tokens_BT[pair_RK],
            real_BKT=rows.real_BT[pair_RK],
            action_BKT=rows.action_BT[pair_RK],
            probability_B=probability_R,
            ref_logp_BKT=heard.ref_BT[pair_RK],
            temperature=rows.temperature,
            memory={},
            metrics={
                **_graded.summary(heard, scored),
                **_graded.priced(earned_B, heard.kl_BT.sum(-1), self.beta),
                **_graded.of_groups(earned_B, self.group),
                "objective/scores_margin": float(margin_R.mean()),
                "duels/ties": float((margin_R == 0).float().mean()),
                "duels/identical": float((said[:, 0] == said[:, 1]).all(-1).float().mean()),
            },
        )

    def loss(self, cast: Cast, batch: Duels) -> Loss:
        """The mean over pairs of the loss to be expected of their labels."""
        logp_RT = cast.logp("policy", batch.answers(), batch.temperature)
        logp_BKT, pairs = logp_RT.unflatten(0, (batch.size, 2)), _as_pairs(batch)
        average = self.logp_reduce == "mean" or (self.logp_reduce == "auto" and self.loss_type == "ipo")
        said = _pairs.answers(logp_BKT, pairs, average)
        formula = losses.dpo if self.loss_type == "sigmoid" else losses.ipo
        loss_B = _pairs.expected(formula(*said, self.beta), formula(*said.swapped, self.beta), batch.probability_B)
        return Loss({"loss": Term(loss_B.sum(), "rows")}, _pairs.seen(logp_BKT, pairs, self.beta * said.gain_BK))

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""

    def _meetings(self, earned_B: Tensor) -> Tensor:
        """Rows of the rollout that meet, R×2; equal scores still meet, so that their number is always the same."""
        order_GK = earned_B.view(-1, self.group).sort(dim=-1, descending=True, stable=True).indices
        every = list(combinations(range(self.group), 2))
        chosen = every if self.pairs == "all" else [(0, self.group - 1)]
        first_G1 = torch.arange(len(order_GK), device=order_GK.device)[:, None] * self.group
        return (order_GK + first_G1)[:, torch.tensor(chosen, device=order_GK.device)].flatten(0, 1)

    def _judged(self, pair_RK: Tensor, earned_B: Tensor, counter: int) -> tuple[Tensor, Tensor]:
        """The pairs, better scored first, as their labels order them, and how likely that order is right."""
        gap_R = earned_B[pair_RK[:, 0]] - earned_B[pair_RK[:, 1]]
        odds_R = (gap_R / self.label_temperature).sigmoid()
        if self.label == "soft":
            return pair_RK, odds_R
        if self.label == "argmax":
            return pair_RK, torch.where(gap_R > 0, 1.0, 0.5).to(odds_R)
        keys = np.array([key(counter, "label", *sorted(pair)) for pair in pair_RK.tolist()], dtype=np.uint64)
        lost_R = torch.from_numpy(uniforms(keys, 0)).to(odds_R) >= odds_R
        return torch.where(lost_R[:, None], pair_RK.flip(-1), pair_RK), torch.ones_like(odds_R)


def _as_pairs(batch: Duels) -> Pairs:
    """The same as the formulas of pairs read it."""
    nothing_B, nowhere_BKT = torch.zeros_like(batch.probability_B), torch.zeros_like(batch.action_BKT)
    cells = batch.tokens_BKT, batch.real_BKT, batch.action_BKT
    return Pairs(*cells, batch.probability_B, nothing_B, nowhere_BKT, batch.ref_logp_BKT)

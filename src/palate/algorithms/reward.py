"""Reward modelling: give the answer that was preferred the higher number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from palate import losses
from palate.batches import Comparisons, Loss, Mean, Term
from palate.cast import Cast
from palate.settings import Choice


class Algorithm(Choice):
    """Reward model: Bradley–Terry on pairs, InstructGPT's ranking loss on K answers, or best-of-K of the 2019 work."""

    trains: ClassVar[tuple[str, ...]] = ("reward",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "rankings"

    kind: str = "reward"
    """Reward modelling."""
    loss_type: Literal["ranking", "best_of"] = "ranking"
    """`ranking`: −log σ of every comparable pair, averaged inside a prompt first (two answers: Bradley–Terry).
    `best_of`: softmax cross-entropy of the best answer among K."""
    margin: bool = False
    """Ask chosen to exceed rejected by the pair's stated margin (pairs only)."""
    center_rewards_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which keeps rewards near zero; 0 is off."""
    language_loss_coefficient: float = Field(default=0.0, ge=0)
    """Weight of next-token prediction on the answers beside the ranking; keeps the trunk reading them. 0 is off."""

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Any row will do."""
        return rows

    def prepare(self, cast: Cast, raw: Comparisons) -> Comparisons:
        """Nothing has to be known beforehand."""
        return raw

    def loss(self, cast: Cast, batch: Comparisons) -> Loss:
        """One forward of all answers; the loss is averaged inside a prompt, then over prompts."""
        answers = batch.answers()
        score_BK = batch.place(cast.scores("reward", answers))
        terms = {"loss": Term(self._preference(score_BK, batch).sum(), per="rows")}
        if self.center_rewards_coefficient:
            squared_B = losses.centring(score_BK, batch.present_BK)
            terms["loss/center"] = Term(squared_B.sum(), "rows", self.center_rewards_coefficient)
        if self.language_loss_coefficient:
            nll_RT = losses.cross_entropy(cast.logp("reward", answers), answers.action_BT)
            terms["loss/language"] = Term(nll_RT.sum(), "tokens", self.language_loss_coefficient)
        return Loss(terms, _metrics(score_BK.detach(), batch))

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""

    def _preference(self, score_BK: Tensor, batch: Comparisons) -> Tensor:
        if self.loss_type == "best_of":
            masked_BK = score_BK.masked_fill(~batch.present_BK, float("-inf"))
            choice_B = batch.rank_BK.masked_fill(~batch.present_BK, batch.rank_BK.max() + 1).argmin(-1)
            return losses.best_of(masked_BK, choice_B)
        if self.margin:
            first_B, second_B = _two(score_BK, batch.rank_BK)
            return losses.bradley_terry(first_B, second_B, batch.margin_B)
        return losses.ranking(score_BK, batch.rank_BK, batch.present_BK)


def _two(score_BK: Tensor, rank_BK: Tensor) -> tuple[Tensor, Tensor]:
    order_BK = rank_BK[:, :2].sort(dim=-1, stable=True).indices
    return score_BK.gather(1, order_BK[:, :1])[:, 0], score_BK.gather(1, order_BK[:, 1:2])[:, 0]


def _metrics(score_BK: Tensor, batch: Comparisons) -> dict[str, Mean]:
    """Accuracy over comparable pairs (ties of score count as wrong), mean margin, and where the scores lie."""
    here_BKK = batch.present_BK[:, :, None] & batch.present_BK[:, None, :]
    better_BKK = here_BKK & (batch.rank_BK[:, :, None] < batch.rank_BK[:, None, :])
    gap_BKK = score_BK[:, :, None] - score_BK[:, None, :]
    pairs, scores = float(better_BKK.sum()), score_BK[batch.present_BK]
    rows = float(batch.size)
    low_B = score_BK.masked_fill(~batch.present_BK, float("inf")).amin(-1)
    high_B = score_BK.masked_fill(~batch.present_BK, float("-inf")).amax(-1)
    return {
        "accuracy": Mean((gap_BKK[better_BKK] > 0).sum().to(torch.float32), pairs),
        "margin": Mean(gap_BKK[better_BKK].sum(), pairs),
        "mean_reward": Mean(scores.sum(), float(scores.numel())),
        "min_reward": Mean(low_B.sum(), rows),
        "max_reward": Mean(high_B.sum(), rows),
    }

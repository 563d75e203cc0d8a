"""Reward modelling: give the answer that was preferred the higher number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from palate import losses
from palate.algorithms import _pairs
from palate.batches import Comparisons, Labelled, Loss, Mean, Term, Trajectories
from palate.cast import Cast
from palate.settings import Choice, PalateError


class Algorithm(Choice):
    """Reward model: Bradley–Terry on pairs (soft labels too), rankings of K, best-of-K, numbers, or thumbs of steps."""

    trains: ClassVar[tuple[str, ...]] = ("reward",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    kind: str = "reward"
    """Reward modelling."""
    loss_type: Literal["ranking", "best_of", "regression", "binary"] = "ranking"
    """`ranking`: −log σ of every comparable pair, averaged inside a prompt first (two answers: Bradley–Terry).
    `best_of`: softmax cross-entropy of the best answer among K. `regression`: squared error to a rating.
    `binary`: cross-entropy of a thumb; steps with thumbs (TRL's stepwise rows) train a process reward model."""
    margin: bool = False
    """Ask chosen to exceed rejected by the pair's stated margin (pairs only)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε, the share of labels taken to be wrong; pairs that state a probability are smoothed on top of it."""
    center_rewards_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which keeps rewards near zero; 0 is off."""
    language_loss_coefficient: float = Field(default=0.0, ge=0)
    """Weight of next-token prediction on the answers beside the ranking; keeps the trunk reading them. 0 is off."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        single = self.loss_type in ("regression", "binary")
        if single and (self.margin or self.center_rewards_coefficient):
            raise ValueError(f"margin and center_rewards_coefficient speak of pairs; {self.loss_type} has none")
        if self.label_smoothing and self.loss_type in ("best_of", "regression"):
            raise ValueError(f"label_smoothing: {self.loss_type} has no label that could be the other way round")
        return self

    @property
    def reads(self) -> str:
        """Rankings, or single answers with ratings or thumbs."""
        return {"regression": "returns", "binary": "labels"}.get(self.loss_type, "rankings")

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Refuses what cannot be learnt from: ratings or thumbs that are all alike, probabilities of more than two."""
        if self.loss_type == "regression" and len({row.rating for row in rows}) == 1:
            raise PalateError(f"data: all {len(rows)} ratings are {rows[0].rating:g}; there is nothing to tell apart.")
        if self.loss_type == "binary" and len({row.label for row in rows}) == 1:
            way = "up" if rows[0].label else "down"
            raise PalateError(f"data: all {len(rows)} thumbs are {way}; there is nothing to tell apart. Bring both.")
        if self.reads == "rankings":
            soft = [row for row in rows if row.probability is not None]
            if soft and (self.loss_type == "best_of" or any(len(row.rows) != 2 for row in soft)):
                raise PalateError(
                    "data: a probability says which of *two* answers is better. Take loss_type ranking and pairs, "
                    "or leave the probabilities out."
                )
        return rows

    def prepare(self, cast: Cast, raw: Comparisons | Trajectories | Labelled) -> Comparisons | Trajectories | Labelled:
        """Nothing has to be known beforehand."""
        return raw

    def loss(self, cast: Cast, batch: Comparisons | Trajectories | Labelled) -> Loss:
        """One forward of all answers; the loss is averaged inside a prompt, then over prompts."""
        answers = batch.answers() if isinstance(batch, Comparisons) else batch
        score_R = cast.scores("reward", answers)
        if isinstance(batch, Comparisons):
            score_BK = batch.place(score_R)
            terms = {"loss": Term(self._preference(score_BK, batch).sum(), per="rows")}
            if self.center_rewards_coefficient:
                squared_B = losses.centring(score_BK, batch.present_BK)
                terms["loss/center"] = Term(squared_B.sum(), "rows", self.center_rewards_coefficient)
            metrics = _metrics(score_BK.detach(), batch)
        else:
            error_B, metrics = self._single(score_R, batch)
            terms = {"loss": Term(error_B.sum(), per="rows")}
        if self.language_loss_coefficient:
            nll_RT = losses.cross_entropy(cast.logp("reward", answers), answers.action_BT)
            terms["loss/language"] = Term(nll_RT.sum(), "tokens", self.language_loss_coefficient)
        return Loss(terms, metrics)

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""

    def _single(self, score_B: Tensor, batch: Trajectories | Labelled) -> tuple[Tensor, dict[str, Mean]]:
        """The error of each answer on its own: (r − rating)², or that of a thumb with logit r."""
        rows, seen_B = float(batch.size), score_B.detach()
        metrics = {"mean_reward": Mean(seen_B.sum(), rows)}
        if isinstance(batch, Trajectories):
            return losses.rating_error(score_B, batch.reward_BT.sum(-1)), metrics
        good_B = batch.desirable_B
        right_B = torch.where(good_B, seen_B > 0, seen_B < 0)
        metrics["label_accuracy"] = Mean(right_B.sum().float(), rows)
        return losses.soft_bradley_terry(score_B, torch.zeros_like(score_B), _belief(good_B, self)), metrics

    def _preference(self, score_BK: Tensor, batch: Comparisons) -> Tensor:
        if self.loss_type == "best_of":
            masked_BK = score_BK.masked_fill(~batch.present_BK, float("-inf"))
            choice_B = batch.rank_BK.masked_fill(~batch.present_BK, batch.rank_BK.max() + 1).argmin(-1)
            return losses.best_of(masked_BK, choice_B)
        sure_B = torch.ones_like(score_BK[:, 0]) if batch.probability_B is None else batch.probability_B
        target_B = _pairs.sureness(sure_B, self.label_smoothing)
        if self.margin:
            first_B, second_B = _two(score_BK, batch.rank_BK)
            return losses.soft_bradley_terry(first_B, second_B, target_B, batch.margin_B)
        straight_B = losses.ranking(score_BK, batch.rank_BK, batch.present_BK)
        if self.label_smoothing == 0 and batch.probability_B is None:
            return straight_B
        swapped_B = losses.ranking(score_BK, -batch.rank_BK, batch.present_BK)
        return _pairs.expected(straight_B, swapped_B, target_B)


def _belief(good_B: Tensor, settings: Algorithm) -> Tensor:
    """How likely each thumb should be up."""
    return _pairs.sureness(good_B.float(), settings.label_smoothing)


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

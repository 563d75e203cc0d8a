"""Implicit language Q-learning: learn what tokens are worth from rated text, and let that steer decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from palate import losses
from palate.batches import Loss, Mean, Term, Trajectories
from palate.cast import Acts, Cast
from palate.data.encode_pairs import RatedRow
from palate.settings import Choice, PalateError


class Algorithm(Choice):
    """Offline Q-learning on rated answers: values of tokens, which steer decoding.

    Snell et al. 2022 (2206.11871), laid out as trlX does: two Q heads, their slow copies and a value head sit beside
    the policy on its trunk. The policy itself learns to imitate; what is better than imitation comes from decoding with
    `steering.beta`.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "returns"

    kind: str = "ilql"
    """Implicit language Q-learning."""
    tau: float = Field(default=0.7, gt=0, lt=1)
    """Expectile τ of the value function: ½ is the mean of the Q values seen in the data, towards 1 their largest."""
    gamma: float = Field(default=0.99, ge=0, le=1)
    """Discount γ per action."""
    cql_scale: float = Field(default=0.1, ge=0)
    """Weight of the conservative term, −log softmax(Q)(a), which keeps tokens that were not tried from looking good."""
    awac_scale: float = Field(default=1.0, ge=0)
    """Weight of imitation, −e^(β·advantage) log π(a)."""
    beta: float = Field(default=0.0, ge=0)
    """β of that weight; 0 imitates every action alike. Decoding has a beta of its own, `steering.beta`."""
    alpha: float = Field(default=0.001, gt=0, le=1)
    """Share of the Q heads that goes into their slow copies at each sync (Polyak averaging). The default is trlX's, for
    long runs; its example of some hundred steps takes 0.1."""
    steps_for_target_q_sync: int = Field(default=5, ge=1)
    """Optimiser steps between two syncs."""
    two_qs: bool = True
    """Two Q heads, of whose slow copies the lower value counts; false: one."""
    standardise_returns: bool = True
    """Bring the ratings of the data set to mean 0 and standard deviation 1 (unbiased) before training."""

    @property
    def trains(self) -> tuple[str, ...]:
        """The policy, the Q heads and the value head."""
        return ("policy", *self._q, "value")

    @property
    def moves(self) -> tuple[str, ...]:
        """The slow copies."""
        return tuple(f"target_{q}" for q in self._q)

    @property
    def _q(self) -> tuple[str, ...]:
        return ("q1", "q2") if self.two_qs else ("q1",)

    def survey(self, rows: Sequence[RatedRow]) -> Sequence[RatedRow]:
        """Standardise the returns over the data set; PalateError where they are all equal."""
        return_R = torch.tensor([row.rating for row in rows], dtype=torch.float64)
        if len(rows) and bool((return_R == return_R[0]).all()):
            raise PalateError(
                f"returns: all {len(rows):,} are {rows[0].rating:g}, so no action is better than another. "
                "Bring answers with different ratings."
            )
        if not self.standardise_returns:
            return rows
        z_R = (return_R - return_R.mean()) / return_R.std()
        return [replace(row, rating=z) for row, z in zip(rows, z_R.tolist(), strict=True)]

    def prepare(self, cast: Cast, raw: Trajectories) -> Trajectories:
        """Nothing has to be known beforehand: the slow copies stand beside the policy."""
        return raw

    def loss(self, cast: Cast, batch: Trajectories) -> Loss:
        """Q, V, CQL and AWAC, each averaged over the actions; one pass through the trunk gives all of them."""
        acts = cast.acts("policy", self._q, self.moves, "value", batch)
        terms_N = losses.ilql_taken(
            acts.q_HN,
            acts.total_HN,
            acts.target_HN,
            acts.value_N,
            acts.after_N,
            batch.reward_BT[acts.asked_BT],
            acts.logp_N,
            self.tau,
            self.gamma,
            self.beta,
        )
        terms = {
            "loss/q": Term(terms_N["q"].sum(), "tokens"),
            "loss/v": Term(terms_N["v"].sum(), "tokens"),
            "loss/cql": Term(terms_N["cql"].sum(), "tokens", self.cql_scale),
            "loss/awac": Term(terms_N["awac"].sum(), "tokens", self.awac_scale),
        }
        return Loss(terms, _metrics(acts))

    def after(self, cast: Cast, step: int) -> None:
        """Every few optimiser steps the slow copies follow the Q heads a little."""
        if step % self.steps_for_target_q_sync == 0:
            for q, target in zip(self._q, self.moves, strict=True):
                cast.blend(q, target, self.alpha)


def _metrics(acts: Acts) -> dict[str, Mean]:
    count = float(acts.token_N.numel())
    least_N, value_N = torch.stack(acts.target_HN).amin(0), acts.value_N.detach()
    return {
        "qvalues/mean": Mean(least_N.sum(), count),
        "values/mean": Mean(value_N.sum(), count),
        "qvalues/advantage": Mean((least_N - value_N).sum(), count),
        "entropy": Mean(acts.entropy_N.sum(), count),
    }

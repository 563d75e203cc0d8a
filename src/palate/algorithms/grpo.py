"""Group-relative policy optimisation and its published variants: Dr. GRPO, DAPO, GSPO, CISPO."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from palate import credit, losses
from palate.algorithms import _graded, _moving
from palate.batches import Graded, Loss, Scored, Term
from palate.cast import Cast
from palate.settings import Choice, PalateError


class Algorithm(Choice):
    """GRPO: an answer is worth what it beats its group's mean by, in units of the group's spread (2402.03300).

    The paper has the KL as a loss (`kl_in: loss`, `kl_estimator: k3`); here it is in the reward unless asked: that
    alone has the optimum of E[score] − β·KL(π‖π_ref). Dr. GRPO (2503.20783) is `scale_rewards: none, loss_type:
    dr_grpo`; DAPO (2503.14476) is `loss_type: dapo, epsilon_high: 0.28, beta: 0, dynamic_sampling, overlong_cache`;
    GSPO (2507.18071) is `importance_level: sequence, loss_type: grpo`; CISPO (2506.13585) is `surrogate: cispo`.
    """

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    learns: ClassVar[type[Graded]] = Graded

    kind: str = "grpo"
    """Group-relative policy optimisation."""
    num_generations: _graded.Group = 8
    """Answers sampled per prompt, at least 2: the group."""
    num_iterations: int = Field(default=1, ge=1)
    """Passes over one rollout."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Optimiser steps in one pass; each takes its share of a fresh permutation."""
    beta: float = Field(default=0.04, ge=0)
    """β: what a nat of KL to the reference costs, in units of reward; 0 needs no reference at all."""
    kl_in: Literal["reward", "loss"] = "reward"
    """KL as part of each answer's reward, before the group is compared, or as a loss beside the surrogate."""
    kl_estimator: _graded.Estimator = "k1"
    """In the reward k1. As a loss k2 and k3_ratio pull to π_ref, k3 follows KL(π_ref‖π), k1 does nothing at all."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What rewards are divided by after the group's mean is taken off: the group's spread, the batch's, or nothing."""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "dapo"
    """Mean over tokens of all answers (dapo, bnpo), of each answer (grpo), or sum over max_new_tokens (dr_grpo)."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """Clip the update (PPO) or only its weight, so that every token keeps a gradient (CISPO, upper bound alone)."""
    importance_level: Literal["token", "sequence"] = "token"
    """The ratio of each token, or the length-normalised one of the whole answer (GSPO)."""
    epsilon: float = Field(default=0.2, gt=0)
    """ε: the ratio is clipped at 1 − ε."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """ε': the ratio is clipped at 1 + ε'; none takes ε. DAPO 0.28; 3e-4 and 4e-4 with GSPO; 4 with CISPO."""
    delta: float | None = Field(default=None, gt=1)
    """The largest ratio a bad answer may be punished with, above 1 + ε' (two-sided clip); none sets no bound."""
    dynamic_sampling: int = Field(default=0, ge=0)
    """Rounds of further prompts that may be drawn to replace groups without spread; 0 keeps such groups (DAPO)."""
    overlong_cache: int = Field(default=0, ge=0)
    """The last so many tokens before max_new_tokens in which a score falls by up to 1 (DAPO, eq. 13); 0 is off."""
    mask_truncated_completions: bool = False
    """Do not train on answers cut by length; their scores still count in their group's mean."""
    old_logprobs: Literal["sampled", "recomputed"] = "recomputed"
    """Old log-probabilities: the sampler's own, or a fresh forward pass (exact ratio 1 in the first minibatch)."""
    importance_correction: _graded.Correction = "none"
    """Weigh samples by policy/sampler, per token or answer, truncated at the cap or masked beyond it."""
    importance_cap: float = Field(default=3.0, ge=1)
    """The largest weight a sample may have."""
    ref_model_sync_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps from one move of the reference towards the policy to the next (400 in R1); none: it stays."""
    ref_model_mixup_alpha: float = Field(default=1.0, gt=0, le=1)
    """Share of the policy in the reference after each of its moves; 1 is a copy."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _graded.require_old_of_its_own(self.old_logprobs, self.importance_correction)
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"kl_estimator {self.kl_estimator} in the reward has another optimum (k3 overflows there). Take k1, or "
                "kl_in: loss."
            )
        if self.ref_model_sync_steps is not None and not self.beta:
            raise ValueError("ref_model_sync_steps: with beta 0 there is no reference that could move. Leave it out.")
        if self.delta is not None and self.delta <= 1 + self.above:
            raise ValueError(f"delta {self.delta} is not above 1 + epsilon_high = {1 + self.above}, so it would clip.")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """The reference, unless its KL is free."""
        return ("reference",) if self.beta else ()

    @property
    def moves(self) -> tuple[str, ...]:
        """The reference, where it follows the policy."""
        return () if self.ref_model_sync_steps is None else ("reference",)

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

    @property
    def above(self) -> float:
        """ε', the upper side of the clip."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def below(self) -> float:
        """ε, the lower side of the clip; CISPO has none."""
        return math.inf if self.surrogate == "cispo" else self.epsilon

    def warnings(self) -> list[str]:
        """What a KL loss does that KL in the reward does not (Schulman 2020; 2510.01555)."""
        if not (self.beta and self.kl_in == "loss"):
            return []
        found = {
            "k1": "kl_estimator k1 as a loss has gradient 0 on average, so nothing holds the policy to the reference.",
            "k3": "kl_estimator k3 as a loss is biased: its gradient is that of KL(π_ref‖π), not of KL(π‖π_ref).",
        }.get(self.kl_estimator, "a KL loss per token leaves out what a token does to the KL of later ones.")
        scaled = "" if self.scale_rewards == "none" else " scale_rewards divides rewards and not this KL, so β drifts."
        return [f"{found}{scaled} kl_in: reward has neither fault."]

    def memory(self) -> dict[str, float]:
        """Nothing is remembered."""
        return {}

    def prepare(self, cast: Cast, scored: Scored) -> Graded:
        """Advantages of a whole rollout; no gradient."""
        if self.moves:
            _moving.require_movable(cast)
        rows = scored.rollouts
        heard = _graded.hear(cast, rows, bool(self.beta), self.old_logprobs)
        earned_B, kl_B = _graded.earned(scored), heard.kl_BT.sum(-1)
        reward_B = earned_B + self._overlong(scored)
        paid_B = reward_B - self.beta * kl_B if self.kl_in == "reward" else reward_B
        advantage_BT = heard.over_tokens(self._relative(paid_B))
        weight_BT = _graded.weights(heard, self.importance_correction, self.importance_cap)
        metrics = _graded.of_groups(reward_B, self.group)
        metrics |= _graded.of_advantages(advantage_BT, rows.action_BT)
        if self.beta:
            metrics |= _graded.priced(earned_B, kl_B, self.beta)
        trained_BT = rows.action_BT
        if self.mask_truncated_completions:
            trained_BT = trained_BT & rows.finished_B[:, None]
        weight_BT = weight_BT / self._among(trained_BT, rows.limit)
        return _graded.graded(heard, scored, advantage_BT, weight_BT, {}, metrics, trained_BT)

    def loss(self, cast: Cast, batch: Graded) -> Loss:
        """The surrogate, and where KL is a loss β times its estimate, each token weighed alike in both."""
        logp_BT, entropy_BT = cast.logp("policy", batch, batch.temperature, entropy=True)
        said, per = batch.action_BT, "tokens" if self.loss_type in ("dapo", "bnpo") else "rows"
        logp_N, old_N, advantage_N, weight_N = (
            x_BT[said] for x_BT in (logp_BT, batch.logp_BT, batch.advantage_BT, batch.weight_BT)
        )
        change_N = logp_N - old_N
        if self.importance_level == "sequence":
            change_N = losses.sequence_log_ratio(logp_BT, batch.logp_BT, said)[said]
        policy_N = weight_N * self._surrogate(change_N, logp_N, advantage_N)
        terms = {"loss/policy_avg": Term(policy_N.sum(), per)}
        if self.beta and self.kl_in == "loss":
            kl_N = _graded.kl_loss(self.kl_estimator, logp_N, old_N, batch.ref_logp_BT[said])
            terms["loss/kl_avg"] = Term((weight_N * kl_N).sum(), per, self.beta)
        clipped = _graded.clipped(change_N, advantage_N, self.below, self.above)
        return Loss(terms, {**_graded.seen(logp_N - old_N, entropy_BT[said]), **clipped})

    def after(self, cast: Cast, step: int) -> None:
        """Every so many steps the reference moves towards the policy, where it does."""
        _moving.follow(cast, step, self.ref_model_sync_steps, self.ref_model_mixup_alpha)

    def _overlong(self, scored: Scored) -> Tensor:
        """What answers near the longest possible length lose of their score, per row."""
        if not self.overlong_cache:
            return torch.zeros_like(scored.score_B)
        limit = _limit(scored.rollouts.limit, "overlong_cache")
        if self.overlong_cache > limit:
            raise PalateError(
                f"overlong_cache: {self.overlong_cache} is more than the {limit} tokens of max_new_tokens."
            )
        return credit.overlong_penalty(scored.rollouts.length_B, limit, self.overlong_cache)

    def _relative(self, reward_B: Tensor) -> Tensor:
        """Each reward against its group's, per row."""
        if self.scale_rewards == "batch":
            centred_B = credit.within_group(reward_B, self.group, scale=False)
            return centred_B * (reward_B.var(correction=0) + 1e-8).rsqrt()
        return credit.within_group(reward_B, self.group, scale=self.scale_rewards == "group")

    def _among(self, trained_BT: Tensor, limit: int | None) -> Tensor | int:
        """What each token's loss is divided by before tokens or answers are averaged, B×1; see `loss_type`."""
        if self.loss_type == "dr_grpo":
            return _limit(limit, "loss_type")
        return trained_BT.sum(-1, keepdim=True).clamp(min=1) if self.loss_type == "grpo" else 1

    def _surrogate(self, change_N: Tensor, logp_N: Tensor, advantage_N: Tensor) -> Tensor:
        if self.surrogate == "cispo":
            return losses.cispo(logp_N, (logp_N - change_N).detach(), advantage_N, self.above)
        old_N = change_N.new_zeros(change_N.shape)
        return losses.clipped_surrogate(change_N, old_N, advantage_N, self.epsilon, self.above, self.delta)


def _limit(limit: int | None, setting: str) -> int:
    if limit is None:
        raise PalateError(f"{setting}: the engine did not say how long an answer may be. Set sampling.max_new_tokens.")
    return limit

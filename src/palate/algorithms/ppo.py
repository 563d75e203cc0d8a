"""Proximal policy optimisation, as lm-human-preferences, its reproductions and the TL;DR work do it."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from palate import credit, losses
from palate.algorithms import _graded, _moving
from palate.algorithms import _ppo_rollout as rollout
from palate.batches import Experience, Loss, Mean, Scored, Term
from palate.cast import Cast
from palate.settings import Choice


class Algorithm(Choice):
    """PPO: clipped policy and value steps on advantages of a KL-penalised reward (Schulman 2017, Ziegler 2019)."""

    trains: ClassVar[tuple[str, ...]] = ("policy", "value")
    needs: ClassVar[tuple[str, ...]] = ("reference",)
    learns: ClassVar[type[Experience]] = Experience
    group: ClassVar[int] = 1

    kind: str = "ppo"
    """Proximal policy optimisation."""
    num_ppo_epochs: int = Field(default=4, ge=1)
    """Passes over one rollout."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Optimiser steps in one pass; each takes its share of a fresh permutation."""
    kl_coef: float = Field(default=0.05, ge=0)
    """β: what a nat of KL to the reference costs, in units of reward; the start value when it adapts."""
    target_kl: float | None = Field(default=None, gt=0)
    """Nats per answer that an adaptive β steers to; none keeps β fixed."""
    horizon: float = Field(default=10000.0, gt=0)
    """Episodes over which the adaptive β may change by about a fifth."""
    kl_in: Literal["reward", "loss"] = "reward"
    """KL as part of each token's reward, or as a loss beside the surrogate, weighted by β."""
    kl_estimator: _graded.Estimator = "k1"
    """In the reward k1 is right. As a loss k2 and k3_ratio pull to π_ref, k3 follows KL(π_ref‖π), k1 does nothing."""
    cliprange: float = Field(default=0.2, gt=0)
    """ε of the policy ratio."""
    dual_clip: float | None = Field(default=None, gt=1)
    """c: what a bad token costs is at most −c times its advantage, however large its ratio; none sets no bound."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """How far a value may move from its old one before its gradient is cut, in units of the (whitened) reward."""
    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss beside the policy loss."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the policy's entropy per token, which is raised; 0 in the published runs."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation."""
    lam_value: float | None = Field(default=None, ge=0, le=1)
    """λ of the returns that values learn; none takes `lam`. 1 in VC-PPO and VAPO: long answers lose no reward."""
    critic_warmup: int = Field(default=0, ge=0)
    """Rollouts at the start from which only the value learns; the head alone where it shares the policy's weights."""
    scale_scores: Literal["ignored", "running", "ref"] = "ignored"
    """Divide scores by the standard deviation of all so far (running) or of the first rollout's (ref), as trlX."""
    center_scores: bool = False
    """Take the mean of the same scores off before dividing; trlX does not."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance over the rollout's tokens, keeping their mean."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the rollout's tokens."""
    score_position: Literal["last", "after"] = "last"
    """Where the score lands: on the last token, or on the state after it, where the reward model reads (TL;DR)."""
    old_logprobs: Literal["sampled", "recomputed"] = "recomputed"
    """Old log-probabilities: the sampler's own, or a fresh forward pass (exact ratio 1 in the first minibatch)."""
    ref_model_sync_steps: int | Literal["rollout"] | None = None
    """Optimiser steps, or a rollout, from one move of the reference towards the policy to the next; none: it stays."""
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    """Share of the policy in the reference after each of its moves; 1 is a copy."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kl_in == "reward" and self.kl_estimator not in rollout.ESTIMATORS:
            raise ValueError(f"kl_estimator {self.kl_estimator} is a loss. Take k1, or kl_in: loss.")
        if self.kl_in == "loss" and self.target_kl is not None:
            raise ValueError("target_kl steers the price of KL in the reward. Leave it out, or take kl_in: reward.")
        if self.center_scores and self.scale_scores == "ignored":
            raise ValueError("center_scores takes the mean off scores that are scaled. Set scale_scores too.")
        if isinstance(self.ref_model_sync_steps, int) and self.ref_model_sync_steps < 1:
            raise ValueError("ref_model_sync_steps is 1 or more, `rollout`, or left out.")
        return self

    @property
    def moves(self) -> tuple[str, ...]:
        """The reference, where it follows the policy."""
        return () if self.ref_model_sync_steps is None else ("reference",)

    @property
    def passes(self) -> int:
        """Passes over one rollout."""
        return self.num_ppo_epochs

    @property
    def minibatches(self) -> int:
        """Optimiser steps in one pass."""
        return self.num_mini_batches

    def warnings(self) -> list[str]:
        """What the chosen KL estimate does that k1 in the reward does not."""
        return rollout.kl_warnings(self.kl_in, self.kl_estimator) if self.kl_coef else []

    def memory(self) -> dict[str, float]:
        """What is remembered between iterations: β, and where they count the rollouts and the scores so far."""
        return {"kl_coef": self.kl_coef}

    def prepare(self, cast: Cast, scored: Scored) -> Experience:
        """Rewards, values, advantages and returns of a whole rollout; no gradient."""
        if self.moves:
            _moving.require_movable(cast)
        trained, remembered, scale = rollout.scaled(scored, self.scale_scores, self.center_scores)
        heard = rollout.hear(cast, trained, self.score_position, self.old_logprobs)
        logp_BT, ref_BT, value_BT, mask_BT = heard.logp_BT, heard.ref_BT, heard.value_BT, heard.value_mask_BT
        kl_coef, said_BT = scored.memory["kl_coef"], heard.tokens.action_BT
        price, estimator = (kl_coef, self.kl_estimator) if self.kl_in == "reward" else (0.0, "k1")
        found = rollout.reward_parts(trained.score_B, heard, price, estimator)
        reward_BT = heard.token_reward_BT + (found["kl_penalty"] + found["score"])
        shaped_BT = credit.whiten(reward_BT, mask_BT, shift_mean=False) if self.whiten_rewards else reward_BT
        shaped_BT = shaped_BT.masked_fill(~mask_BT, 0.0)
        raw_BT = credit.gae(shaped_BT, value_BT, mask_BT, self.gamma, self.lam)
        gain_BT = (
            raw_BT if self.lam_value is None else credit.gae(shaped_BT, value_BT, mask_BT, self.gamma, self.lam_value)
        )
        advantage_BT = credit.whiten(raw_BT, said_BT) if self.whiten_advantages else raw_BT
        returns_BT = gain_BT + value_BT
        metrics = rollout.summary(scored, trained, heard, found["kl_penalty"], returns_BT, raw_BT) | scale
        return Experience(
            tokens_BT=heard.tokens.tokens_BT,
            real_BT=heard.tokens.real_BT,
            action_BT=said_BT,
            logp_BT=logp_BT,
            advantage_BT=advantage_BT.masked_fill(~said_BT, 0.0),
            value_BT=value_BT,
            returns_BT=returns_BT.masked_fill(~mask_BT, 0.0),
            value_mask_BT=mask_BT,
            temperature=scored.rollouts.temperature,
            memory={**self._remember(scored, heard.kl_B), **remembered},
            metrics=metrics,
            shown_BT={
                "sampled_logp": heard.sampled_BT,
                "reference_logp": ref_BT,
                "kl": credit.kl_k1(logp_BT, ref_BT),
                "token_reward": heard.token_reward_BT,
                "reward": shaped_BT,
                **found,
            },
            ref_logp_BT=ref_BT if self.kl_in == "loss" else None,
        )

    def loss(self, cast: Cast, batch: Experience) -> Loss:
        """The clipped surrogate over answer tokens and `vf_coef` times the clipped value error."""
        if self.rests(batch):
            value_BT = cast.values("value", batch, head_only=cast.together("policy", "value"))
            return Loss(*self._value(value_BT, batch))
        logp_BT, entropy_BT, value_BT = cast.logp_and_values("policy", "value", batch, batch.temperature)
        said_N = batch.action_BT  # only these cells are read: the rest is nobody's
        logp_N, old_N = logp_BT[said_N], batch.logp_BT[said_N]
        policy_N = losses.clipped_surrogate(
            logp_N, old_N, batch.advantage_BT[said_N], self.cliprange, dual_clip=self.dual_clip
        )
        terms, seen = self._value(value_BT, batch)
        terms = {"loss/policy_avg": Term(policy_N.sum(), "tokens"), **terms}
        if self.entropy_coef:
            terms["loss/entropy_avg"] = Term(-entropy_BT[said_N].sum(), "tokens", self.entropy_coef)
        if batch.ref_logp_BT is not None and self.kl_coef:
            kl_N = _graded.kl_loss(self.kl_estimator, logp_N, old_N, batch.ref_logp_BT[said_N])
            terms["loss/kl_avg"] = Term(kl_N.sum(), "tokens", self.kl_coef)
        return Loss(terms, {**rollout.seen_of_policy(logp_BT, entropy_BT, batch, self.cliprange), **seen})

    def after(self, cast: Cast, step: int) -> None:
        """Every so many steps the reference moves towards the policy, where it does."""
        every = self.passes * self.minibatches if self.ref_model_sync_steps == "rollout" else self.ref_model_sync_steps
        _moving.follow(cast, step, every, self.ref_model_mixup_alpha)

    def rests(self, batch: Experience) -> bool:
        """Whether the policy does not learn from this rollout: the critic is being warmed up."""
        return batch.memory.get("rollouts", self.critic_warmup + 1) <= self.critic_warmup

    def _value(self, value_BT: Tensor, batch: Experience) -> tuple[dict[str, Term], dict[str, Mean]]:
        here_N = batch.value_mask_BT
        error_N = losses.clipped_value_error(
            value_BT[here_N], batch.value_BT[here_N], batch.returns_BT[here_N], self.cliprange_value
        )
        terms = {"loss/value_avg": Term(error_N.sum(), "values", self.vf_coef)}
        return terms, rollout.seen_of_value(value_BT, batch, self.cliprange_value)

    def _remember(self, scored: Scored, kl_B: Tensor) -> dict[str, float]:
        """β for the next rollout, and how many rollouts there were while the critic is warmed up."""
        found = {"kl_coef": scored.memory["kl_coef"]}
        if self.target_kl is not None:
            steered = credit.AdaptiveKL(found["kl_coef"], self.target_kl, self.horizon)
            found["kl_coef"] = steered.update(float(kl_B.mean()), kl_B.numel())
        if self.critic_warmup:
            found["rollouts"] = scored.memory.get("rollouts", 0.0) + 1
        return found

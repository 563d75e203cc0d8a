"""Proximal policy optimisation, as lm-human-preferences, its reproductions and the TL;DR work do it."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from palate import credit, losses
from palate.batches import Experience, Loss, Mean, Scored, Term, Tokens
from palate.cast import Cast
from palate.settings import Choice


class Algorithm(Choice):
    """PPO: clipped policy and value steps on advantages of a KL-penalised reward (Schulman 2017, Ziegler 2019)."""

    trains: ClassVar[tuple[str, ...]] = ("policy", "value")
    moves: ClassVar[tuple[str, ...]] = ()
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
    cliprange: float = Field(default=0.2, gt=0)
    """ε of the policy ratio."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """How far a value may move from its old one before its gradient is cut, in units of the (whitened) reward."""
    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss beside the policy loss."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance over the rollout's tokens, keeping their mean."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the rollout's tokens."""
    score_position: Literal["last", "after"] = "last"
    """Where the score lands: on the last token, or on the state after it, where the reward model reads (TL;DR)."""
    old_logprobs: Literal["sampled", "recomputed"] = "recomputed"
    """Old log-probabilities: the sampler's own, or a fresh forward pass (exact ratio 1 in the first minibatch)."""
    rollout_forward_batch_size: int = Field(default=64, ge=1)
    """Rows a forward pass takes when references, values and old log-probabilities are computed."""

    @property
    def passes(self) -> int:
        """Passes over one rollout."""
        return self.num_ppo_epochs

    @property
    def minibatches(self) -> int:
        """Optimiser steps in one pass."""
        return self.num_mini_batches

    def memory(self) -> dict[str, float]:
        """What is remembered between iterations: β."""
        return {"kl_coef": self.kl_coef}

    def prepare(self, cast: Cast, scored: Scored) -> Experience:
        """Rewards, values, advantages and returns of a whole rollout; no gradient."""
        rows = scored.rollouts
        tokens, token_reward_BT = Tokens(rows.tokens_BT, rows.real_BT, rows.action_BT), scored.token_reward_BT
        sampled_BT, chunk = rows.logp_BT, self.rollout_forward_batch_size
        if self.score_position == "after":  # the state after the longest answer needs a column of its own
            tokens, token_reward_BT, sampled_BT = _widen(tokens), _column(token_reward_BT), _column(sampled_BT)
        value_BT = cast.chunked(tokens, chunk, lambda part: cast.values("value", part))
        ref_BT = cast.chunked(tokens, chunk, lambda part: cast.logp("reference", part, rows.temperature))
        logp_BT = sampled_BT
        if self.old_logprobs == "recomputed":
            logp_BT = cast.chunked(tokens, chunk, lambda part: cast.logp("policy", part, rows.temperature))
        kl_coef, mask_BT = scored.memory["kl_coef"], tokens.action_BT
        value_mask_BT = mask_BT | self._state_after(mask_BT, rows.limit)
        reward_BT = token_reward_BT + credit.shape_reward(scored.score_B, logp_BT, ref_BT, value_mask_BT, kl_coef)
        shaped_BT = credit.whiten(reward_BT, value_mask_BT, shift_mean=False) if self.whiten_rewards else reward_BT
        shaped_BT = shaped_BT.masked_fill(~value_mask_BT, 0.0)
        value_BT = value_BT.masked_fill(~value_mask_BT, 0.0)
        raw_BT = credit.gae(shaped_BT, value_BT, value_mask_BT, self.gamma, self.lam)
        advantage_BT = credit.whiten(raw_BT, mask_BT) if self.whiten_advantages else raw_BT
        kl_B = (logp_BT - ref_BT).masked_fill(~mask_BT, 0.0).sum(-1)
        returns_BT = raw_BT + value_BT
        return Experience(
            tokens_BT=tokens.tokens_BT,
            real_BT=tokens.real_BT,
            action_BT=mask_BT,
            logp_BT=logp_BT,
            advantage_BT=advantage_BT.masked_fill(~mask_BT, 0.0),
            value_BT=value_BT,
            returns_BT=returns_BT.masked_fill(~value_mask_BT, 0.0),
            value_mask_BT=value_mask_BT,
            temperature=rows.temperature,
            memory=self._remember(kl_coef, float(kl_B.mean()), kl_B.numel()),
            metrics=self._summary(scored, kl_B, logp_BT, value_BT, returns_BT, raw_BT, mask_BT, value_mask_BT),
            shown_BT={
                "sampled_logp": sampled_BT,
                "reference_logp": ref_BT,
                "kl": credit.kl_k1(logp_BT, ref_BT),
                "token_reward": token_reward_BT,
                "reward": shaped_BT,
                **_reward_parts(scored.score_B, logp_BT, ref_BT, value_mask_BT, kl_coef),
            },
        )

    def loss(self, cast: Cast, batch: Experience) -> Loss:
        """The clipped surrogate over answer tokens and `vf_coef` times the clipped value error."""
        logp_BT, entropy_BT, value_BT = cast.logp_and_values("policy", "value", batch, batch.temperature)
        said_N, value_N = batch.action_BT, batch.value_mask_BT  # only these cells are read: the rest is nobody's
        policy_N = losses.clipped_surrogate(
            logp_BT[said_N], batch.logp_BT[said_N], batch.advantage_BT[said_N], self.cliprange
        )
        error_N = losses.clipped_value_error(
            value_BT[value_N], batch.value_BT[value_N], batch.returns_BT[value_N], self.cliprange_value
        )
        terms = {
            "loss/policy_avg": Term(policy_N.sum(), "tokens"),
            "loss/value_avg": Term(error_N.sum(), "values", self.vf_coef),
        }
        return Loss(terms, self._seen(logp_BT.detach(), entropy_BT.detach(), value_BT.detach(), batch))

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""

    def _state_after(self, mask_BT: Tensor, limit: int | None) -> Tensor:
        """The place behind each answer, where its score lands and a value is learnt; none behind one of full length.

        The TL;DR work has no column behind its longest possible answer, so such a row keeps the score on its last
        token (detail 51).
        """
        if self.score_position == "last":
            return torch.zeros_like(mask_BT)
        behind_BT = mask_BT.roll(1, -1) & ~mask_BT
        full_B = mask_BT.sum(-1) >= limit if limit else torch.zeros_like(mask_BT[:, 0])
        return behind_BT & ~full_B[:, None]

    def _remember(self, kl_coef: float, kl: float, episodes: int) -> dict[str, float]:
        if self.target_kl is None:
            return {"kl_coef": kl_coef}
        return {"kl_coef": credit.AdaptiveKL(kl_coef, self.target_kl, self.horizon).update(kl, episodes)}

    def _summary(
        self,
        scored: Scored,
        kl_B: Tensor,
        logp_BT: Tensor,
        value_BT: Tensor,
        returns_BT: Tensor,
        advantage_BT: Tensor,
        mask_BT: Tensor,
        value_mask_BT: Tensor,
    ) -> dict[str, float]:
        """Metrics of a rollout before any step on it (detail 40); variances are over tokens, not over ranks."""
        kl_coef, score = scored.memory["kl_coef"], float(scored.score_B.mean())
        non_score = -kl_coef * float(kl_B.mean())
        returns, errors = returns_BT[value_mask_BT], (returns_BT - value_BT)[value_mask_BT]
        variance = float(returns.var(correction=0))
        entropy = float(-logp_BT.masked_fill(~mask_BT, 0.0).sum(-1).mean())
        return {
            "objective/kl": float(kl_B.mean()),
            "objective/entropy": entropy,
            "objective/non_score_reward": non_score,
            "objective/scores": score,
            "objective/rlhf_reward": score + non_score,
            "objective/kl_coef": kl_coef,
            "returns/mean": float(returns.mean()),
            "returns/var": variance,
            "val/error": float(errors.square().mean()),
            "val/explained_variance": 1.0 - float(errors.square().mean()) / max(variance, 1e-12),
            "advantages/mean": float(advantage_BT[mask_BT].mean()),
            "advantages/var": float(advantage_BT[mask_BT].var(correction=0)),
        }

    def _seen(self, logp_BT: Tensor, entropy_BT: Tensor, value_BT: Tensor, batch: Experience) -> dict[str, Mean]:
        """Metrics of one micro-batch, over its answer tokens (value metrics over its value tokens)."""
        mask_BT, value_mask_BT = batch.action_BT, batch.value_mask_BT
        change = (logp_BT - batch.logp_BT)[mask_BT]
        ratio, advantage = change.exp(), batch.advantage_BT[mask_BT]
        clipped = ratio.clamp(1 - self.cliprange, 1 + self.cliprange)
        value, old, returns = (x[value_mask_BT] for x in (value_BT, batch.value_BT, batch.returns_BT))
        moved = torch.clamp(value, old - self.cliprange_value, old + self.cliprange_value)
        tokens, values = float(ratio.numel()), float(value.numel())
        return {
            "policy/approxkl_avg": Mean(0.5 * change.square().sum(), tokens),
            "policy/clipfrac_avg": Mean((-advantage * clipped > -advantage * ratio).float().sum(), tokens),
            "policy/entropy_avg": Mean(entropy_BT[mask_BT].sum(), tokens),
            "val/ratio": Mean(ratio.sum(), tokens),
            "val/ratio_var": Mean((ratio - 1.0).square().sum(), tokens),
            "val/clipfrac_avg": Mean(((moved - returns).square() > (value - returns).square()).float().sum(), values),
        }


def _widen(tokens: Tokens) -> Tokens:
    last = tokens.tokens_BT[:, -1:]
    no = torch.zeros_like(last, dtype=torch.bool)
    return replace(
        tokens,
        tokens_BT=torch.cat([tokens.tokens_BT, last], -1),
        real_BT=torch.cat([tokens.real_BT, no], -1),
        action_BT=torch.cat([tokens.action_BT, no], -1),
    )


def _reward_parts(
    score_B: Tensor, logp_BT: Tensor, ref_BT: Tensor, mask_BT: Tensor, kl_coef: float
) -> dict[str, Tensor]:
    """What `credit.shape_reward` adds up, kept apart; `scored` is where the score lands, even a score of 0."""
    zeros_B, ones_B = torch.zeros_like(score_B), torch.ones_like(score_B)
    scored_BT = credit.shape_reward(ones_B, ref_BT, ref_BT, mask_BT, 0.0) > 0
    return {
        "kl_penalty": credit.shape_reward(zeros_B, logp_BT, ref_BT, mask_BT, kl_coef),
        "score": torch.where(scored_BT, score_B[:, None], 0.0),
        "scored": scored_BT,
    }


def _column(x_BT: Tensor) -> Tensor:
    return torch.cat([x_BT, x_BT.new_zeros(x_BT.shape[0], 1)], -1)

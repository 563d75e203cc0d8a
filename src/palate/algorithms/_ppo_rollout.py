"""What PPO reads of a rollout before any step on it, and what it tells about one; settings stay on its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from palate import credit
from palate.algorithms import _graded
from palate.batches import Experience, Mean, Scored, Tokens
from palate.cast import Cast
from palate.losses import keep

ESTIMATORS = {"k1": credit.kl_k1, "k2": credit.kl_k2, "k3": credit.kl_k3}
"""KL estimators that may stand in a reward."""
_MOMENTS: tuple[str, ...] = ("scores/count", "scores/mean", "scores/square")
"""What is remembered of all scores so far."""


@dataclass(frozen=True)
class Heard:
    """What frozen passes said of a rollout. `value_mask_BT` says where a value is learnt.

    A score that lands on the state after the end needs a column of its own behind the longest answer: every tensor
    here has it then.
    """

    tokens: Tokens
    token_reward_BT: Tensor
    sampled_BT: Tensor
    logp_BT: Tensor
    ref_BT: Tensor
    value_BT: Tensor
    value_mask_BT: Tensor

    @property
    def kl_B(self) -> Tensor:
        """Σ log π − log π_ref over the tokens of each answer."""
        return keep(self.logp_BT - self.ref_BT, self.tokens.action_BT).sum(-1)


def hear(
    cast: Cast,
    scored: Scored,
    position: Literal["last", "after"],
    old: Literal["sampled", "recomputed"],
) -> Heard:
    """Old log-probabilities, the reference's, and values, unless they were spoken with the tokens; no gradient."""
    rows = scored.rollouts
    tokens, token_reward_BT = Tokens(rows.tokens_BT, rows.real_BT, rows.action_BT), scored.token_reward_BT
    sampled_BT = rows.logp_BT
    if position == "after":
        tokens, token_reward_BT, sampled_BT = _widen(tokens), _column(token_reward_BT), _column(sampled_BT)
    spoken_BT = rows.value_BT if (position, old) == ("last", "sampled") else None
    value_BT = cast.chunked(tokens, lambda part: cast.values("value", part)) if spoken_BT is None else spoken_BT
    ref_BT, logp_BT = cast.chunked(tokens, lambda part: cast.logp("reference", part, rows.temperature)), sampled_BT
    if old == "recomputed":
        logp_BT = cast.chunked(tokens, lambda part: cast.logp("policy", part, rows.temperature))
    mask_BT = tokens.action_BT
    value_mask_BT = mask_BT | _state_after(mask_BT, rows.limit) if position == "after" else mask_BT
    return Heard(tokens, token_reward_BT, sampled_BT, logp_BT, ref_BT, keep(value_BT, value_mask_BT), value_mask_BT)


def _widen(tokens: Tokens) -> Tokens:
    last = tokens.tokens_BT[:, -1:]
    no = torch.zeros_like(last, dtype=torch.bool)
    return replace(
        tokens,
        tokens_BT=torch.cat([tokens.tokens_BT, last], -1),
        real_BT=torch.cat([tokens.real_BT, no], -1),
        action_BT=torch.cat([tokens.action_BT, no], -1),
    )


def _column(x_BT: Tensor) -> Tensor:
    return torch.cat([x_BT, x_BT.new_zeros(x_BT.shape[0], 1)], -1)


def _state_after(mask_BT: Tensor, limit: int | None) -> Tensor:
    """The place behind each answer, where its score lands and a value is learnt; none behind one of full length.

    The TL;DR work has no column behind its longest possible answer, so such a row keeps the score on its last
    token (detail 51).
    """
    behind_BT = mask_BT.roll(1, -1) & ~mask_BT
    full_B = mask_BT.sum(-1) >= limit if limit else torch.zeros_like(mask_BT[:, 0])
    return behind_BT & ~full_B[:, None]


def scaled(
    scored: Scored, by: Literal["ignored", "running", "ref"], center: bool
) -> tuple[Scored, dict[str, float], dict[str, float]]:
    """Scores divided by the deviation of all scores so far (`running`) or of the first rollout's (`ref`), as trlX.

    Rewards of tokens are divided alike; an answer's score counts with those of its tokens. With `center` the mean is
    taken off the answer's score first. The second value is what to remember, part of `Scored.memory` the next time; the
    third are metrics.
    """
    if by == "ignored":
        return scored, {}, {}
    moments = credit.RunningMoments(*(scored.memory.get(name, 0.0) for name in _MOMENTS))
    if by == "running" or moments.count == 0:
        moments.update(_graded.earned(scored))
    shift, std = moments.mean if center else 0.0, moments.std
    remembered: dict[str, float] = dict(zip(_MOMENTS, (moments.count, moments.mean, moments.square), strict=True))
    found = replace(scored, score_B=(scored.score_B - shift) / std, token_reward_BT=scored.token_reward_BT / std)
    return found, remembered, {"objective/score_scale": std}


def reward_parts(score_B: Tensor, heard: Heard, price: float, estimator: str) -> dict[str, Tensor]:
    """What `credit.shape_reward` adds up, kept apart; `scored` is where the score lands, even a score of 0."""
    zeros_B, ones_B = torch.zeros_like(score_B), torch.ones_like(score_B)
    logp_BT, ref_BT, mask_BT = heard.logp_BT, heard.ref_BT, heard.value_mask_BT
    scored_BT = credit.shape_reward(ones_B, ref_BT, ref_BT, mask_BT, 0.0) > 0
    return {
        "kl_penalty": credit.shape_reward(zeros_B, logp_BT, ref_BT, mask_BT, price, estimator=ESTIMATORS[estimator]),
        "score": torch.where(scored_BT, score_B[:, None], 0.0),
        "scored": scored_BT,
    }


def summary(
    scored: Scored, trained: Scored, heard: Heard, paid_BT: Tensor, returns_BT: Tensor, advantage_BT: Tensor
) -> dict[str, float]:
    """Metrics of a rollout before any step on it (detail 40); variances are over tokens, not over ranks.

    `trained` holds the scores as they are trained on, `paid_BT` the KL penalty, `advantage_BT` is not whitened.
    """
    mask_BT, value_mask_BT = heard.tokens.action_BT, heard.value_mask_BT
    non_score = float(paid_BT.sum(-1).mean())
    returns, errors = returns_BT[value_mask_BT], (returns_BT - heard.value_BT)[value_mask_BT]
    variance = float(returns.var(correction=0))
    return {
        "objective/kl": float(heard.kl_B.mean()),
        "objective/entropy": float(-keep(heard.logp_BT, mask_BT).sum(-1).mean()),
        "objective/non_score_reward": non_score,
        "objective/scores": float(scored.score_B.mean()),
        "objective/rlhf_reward": float(trained.score_B.mean()) + non_score,
        "objective/kl_coef": scored.memory["kl_coef"],
        "returns/mean": float(returns.mean()),
        "returns/var": variance,
        "val/error": float(errors.square().mean()),
        "val/explained_variance": 1.0 - float(errors.square().mean()) / max(variance, 1e-12),
        "advantages/mean": float(advantage_BT[mask_BT].mean()),
        "advantages/var": float(advantage_BT[mask_BT].var(correction=0)),
    }


def seen_of_policy(logp_BT: Tensor, entropy_BT: Tensor, batch: Experience, clip: float) -> dict[str, Mean]:
    """Metrics of one micro-batch over its answer tokens, detached."""
    mask_BT = batch.action_BT
    change = (logp_BT.detach() - batch.logp_BT)[mask_BT]
    ratio, advantage = change.exp(), batch.advantage_BT[mask_BT]
    clipped, tokens = ratio.clamp(1 - clip, 1 + clip), float(ratio.numel())
    return {
        "policy/approxkl_avg": Mean(0.5 * change.square().sum(), tokens),
        "policy/clipfrac_avg": Mean((-advantage * clipped > -advantage * ratio).float().sum(), tokens),
        "policy/entropy_avg": Mean(entropy_BT.detach()[mask_BT].sum(), tokens),
        "val/ratio": Mean(ratio.sum(), tokens),
        "val/ratio_var": Mean((ratio - 1.0).square().sum(), tokens),
    }


def seen_of_value(value_BT: Tensor, batch: Experience, clip: float) -> dict[str, Mean]:
    """Metrics of one micro-batch over its value cells, detached."""
    here = batch.value_mask_BT
    value, old, returns = (x[here] for x in (value_BT.detach(), batch.value_BT, batch.returns_BT))
    moved = torch.clamp(value, old - clip, old + clip)
    worse = (moved - returns).square() > (value - returns).square()
    return {"val/clipfrac_avg": Mean(worse.float().sum(), float(value.numel()))}


_AS_LOSS: Mapping[str, str] = {
    "k1": "kl_estimator k1 as a loss has gradient 0 on average, so nothing holds the policy to the reference. ",
    "k3": "kl_estimator k3 as a loss is biased: its gradient is that of KL(π_ref‖π), not of KL(π‖π_ref). ",
}
_IN_REWARD: Mapping[str, str] = {
    "k2": "kl_estimator k2 in the reward follows E[k2] − KL(π‖π_ref), not KL(π‖π_ref). Take k1.",
    "k3": "kl_estimator k3 in the reward follows KL(π‖π_ref) − KL(π_ref‖π), which near the reference is 0. Take k1.",
}


def kl_warnings(kl_in: str, estimator: str) -> list[str]:
    """What a KL estimate does that k1 in the reward does not (Schulman 2020; 2510.01555)."""
    if kl_in == "reward":
        return [_IN_REWARD[estimator]] if estimator in _IN_REWARD else []
    found = _AS_LOSS.get(estimator, "a KL loss per token leaves out what a token does to the KL of later ones. ")
    return [f"{found}kl_in: reward with k1 has neither fault."]

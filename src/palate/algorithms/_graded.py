"""What algorithms without a value function share: frozen passes, KL as a loss, weights of samples, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor

from palate import credit, losses
from palate.batches import Graded, Mean, Rollouts, Scored, Tokens
from palate.cast import Cast
from palate.losses import keep

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Estimator = Literal["k1", "k2", "k3", "k3_ratio"]


def require_siblings(answers: int) -> int:
    """The number of answers a prompt, where there is something to compare. ValueError for fewer than two."""
    if answers < 2:
        raise ValueError(
            f"{answers} answer a prompt has no siblings to be compared with, so nothing is learnt. Take 2 or more."
        )
    return answers


Group = Annotated[int, AfterValidator(require_siblings)]
"""The type of a setting that says how many answers are compared with one another."""


@dataclass(frozen=True)
class Heard:
    """What frozen passes said of a rollout: old log-probabilities and the reference's (zeros where nobody asked)."""

    rows: Rollouts
    logp_BT: Tensor
    ref_BT: Tensor
    referred: bool

    @property
    def kl_BT(self) -> Tensor:
        """log π − log π_ref of each answer token, 0 elsewhere and where no reference was asked."""
        said = self.rows.action_BT
        return keep(self.logp_BT - self.ref_BT, said) if self.referred else torch.zeros_like(self.logp_BT)

    def over_tokens(self, x_B: Tensor) -> Tensor:
        """A number per answer at each of its tokens, 0 elsewhere."""
        return keep(x_B[:, None].expand_as(self.logp_BT), self.rows.action_BT)


def hear(cast: Cast, rows: Rollouts, reference: bool, old: Literal["sampled", "recomputed"]) -> Heard:
    """Old log-probabilities, the sampler's own or a fresh pass, and with `reference` the reference's; no gradient."""
    tokens = Tokens(rows.tokens_BT, rows.real_BT, rows.action_BT)
    logp_BT, ref_BT = rows.logp_BT, torch.zeros_like(rows.logp_BT)
    if reference:
        ref_BT = cast.chunked(tokens, lambda part: cast.logp("reference", part, rows.temperature))
    if old == "recomputed":
        logp_BT = cast.chunked(tokens, lambda part: cast.logp("policy", part, rows.temperature))
    return Heard(rows, logp_BT, ref_BT, reference)


def weights(heard: Heard, correction: Correction, cap: float) -> Tensor:
    """What each answer token's loss counts for, by how far the sampler was from the policy; 1 where not corrected."""
    if correction == "none":
        return torch.ones_like(heard.logp_BT)
    level, _, how = correction.partition("_")
    rows = heard.rows
    return credit.importance_weight(
        heard.logp_BT, rows.logp_BT, rows.action_BT, cap, masked=how == "mask", whole=level == "sequence"
    )


def require_old_of_its_own(old: str, correction: Correction) -> None:
    """Refuse a correction where the ratio already starts from the sampler's log-probabilities. ValueError."""
    if old == "sampled" and correction != "none":
        raise ValueError(
            f"importance_correction {correction} compares recomputed log-probabilities with the sampler's. "
            "Set old_logprobs: recomputed, or leave the correction out."
        )


def earned(scored: Scored) -> Tensor:
    """What each answer earned in all: its score and its tokens' own rewards, per row."""
    return scored.score_B + keep(scored.token_reward_BT, scored.rollouts.action_BT).sum(-1)


def kl_loss(estimator: Estimator, logp: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    """A KL estimate of sampled tokens as something to minimise, per element; what its gradient is on average:

    k1: nothing at all. k2: that of KL(π‖π_ref) of the token's own state. k3: that of KL(π_ref‖π). k3_ratio, k3 times
    π/π_old (TRL's `use_bias_correction_kl`): as k2. None of them holds a token responsible for the KL of later ones,
    which only KL in the reward does.
    """
    if estimator == "k1":
        return credit.kl_k1(logp, ref)
    if estimator == "k2":
        return credit.kl_k2(logp, ref)
    ratio = losses.bounded(logp - old, logp, old).exp() if estimator == "k3_ratio" else 1.0
    return credit.kl_k3(logp, ref) * ratio


def graded(
    heard: Heard,
    scored: Scored,
    advantage_BT: Tensor,
    weight_BT: Tensor,
    memory: Mapping[str, float],
    metrics: Mapping[str, float],
    trained_BT: Tensor | None = None,
    **shown_BT: Tensor,
) -> Graded:
    """The batch to learn from: all answer tokens, or those of `trained_BT`. Further keywords are shown to people."""
    rows = heard.rows
    trained_BT = rows.action_BT if trained_BT is None else trained_BT
    referred = {"reference_logp": heard.ref_BT, "kl": heard.kl_BT} if heard.referred else {}
    return Graded(
        tokens_BT=rows.tokens_BT,
        real_BT=rows.real_BT,
        action_BT=trained_BT,
        logp_BT=heard.logp_BT,
        advantage_BT=keep(advantage_BT, trained_BT),
        ref_logp_BT=heard.ref_BT,
        weight_BT=weight_BT,
        temperature=rows.temperature,
        memory=memory,
        metrics={**summary(heard, scored), **metrics},
        shown_BT={
            "sampled_logp": rows.logp_BT,
            **referred,
            "token_reward": scored.token_reward_BT,
            **shown_BT,
        },
    )


def summary(heard: Heard, scored: Scored) -> dict[str, float]:
    """Metrics of a rollout before any step on it."""
    said = heard.rows.action_BT
    found = {
        "objective/scores": float(earned(scored).mean()),
        "objective/entropy": float(-keep(heard.logp_BT, said).sum(-1).mean()),
    }
    if heard.referred:
        found["objective/kl"] = float(heard.kl_BT.sum(-1).mean())
    return {**found, **_mismatch(heard)}


def _mismatch(heard: Heard) -> dict[str, float]:
    """How far the sampler was from the policy whose log-probabilities are trained on; nothing where it is the same."""
    said = heard.rows.action_BT
    if heard.logp_BT is heard.rows.logp_BT or not bool(said.any()):
        return {}
    sampled_N, logp_N = heard.rows.logp_BT[said], heard.logp_BT[said]
    ratio_N = losses.bounded(logp_N - sampled_N, logp_N, sampled_N).exp()
    return {
        "sampling/importance_sampling_ratio/mean": float(ratio_N.mean()),
        "sampling/importance_sampling_ratio/min": float(ratio_N.min()),
        "sampling/importance_sampling_ratio/max": float(ratio_N.max()),
        "sampling/kl": float(credit.kl_k3(sampled_N, logp_N).mean()),
    }


def priced(found_B: Tensor, kl_B: Tensor, kl_coef: float) -> dict[str, float]:
    """Metrics of a reward from which KL was taken: the price of a nat, what was paid, and what is left."""
    paid = -kl_coef * float(kl_B.mean())
    return {
        "objective/kl_coef": kl_coef,
        "objective/non_score_reward": paid,
        "objective/rlhf_reward": float(found_B.mean()) + paid,
    }


def of_groups(reward_B: Tensor, group: int) -> dict[str, float]:
    """Metrics of the spread among siblings."""
    spread_B = credit.group_spread(reward_B, group)
    deviation_G = reward_B.view(-1, group).std(-1, correction=0)
    return {
        "reward_std": float(deviation_G.mean()),
        "frac_reward_zero_std": float((spread_B <= credit.NO_SPREAD).float().mean()),
    }


def of_advantages(advantage_BT: Tensor, said_BT: Tensor) -> dict[str, float]:
    """Metrics of what is about to be trained on, over answer tokens; before any normalisation."""
    found_N = advantage_BT[said_BT]
    if not found_N.numel():
        return {}
    return {"advantages/mean": float(found_N.mean()), "advantages/var": float(found_N.var(correction=0))}


def seen(change_N: Tensor, entropy_N: Tensor) -> dict[str, Mean]:
    """Metrics of one micro-batch from the log-ratios and entropies of its answer tokens."""
    change_N, count = change_N.detach(), float(change_N.numel())
    ratio_N = losses.bounded(change_N, change_N).exp()
    return {
        "policy/approxkl_avg": Mean(0.5 * change_N.square().sum(), count),
        "policy/entropy_avg": Mean(entropy_N.detach().sum(), count),
        "val/ratio": Mean(ratio_N.sum(), count),
        "val/ratio_var": Mean((ratio_N - 1.0).square().sum(), count),
    }


def clipped(change_N: Tensor, advantage_N: Tensor, low: float, high: float) -> dict[str, Mean]:
    """Metrics of the clip, from log-ratios of what it is applied to: tokens, or answers where they are the action."""
    change_N, count = change_N.detach(), float(change_N.numel())
    ratio_N = losses.bounded(change_N, change_N).exp()
    below_N = (ratio_N < 1 - low) & (advantage_N < 0)
    above_N = (ratio_N > 1 + high) & (advantage_N > 0)
    return {
        "policy/clipfrac_avg": Mean((below_N | above_N).float().sum(), count),
        "clip_ratio/low_mean": Mean(below_N.float().sum(), count),
        "clip_ratio/high_mean": Mean(above_N.float().sum(), count),
    }

"""Numbers of laws over all answers: value, distance, entropy, tilting, best of n. Legend as in tree.py; float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expectation(logp_PK: Tensor, value_PK: Tensor) -> Tensor:
    """Σ_y π(y)·value(y) per prompt, 0·(±∞) being 0."""
    p_PK = logp_PK.exp()
    return torch.where(p_PK > 0, p_PK * torch.where(p_PK > 0, value_PK, 0.0), 0.0).sum(-1)


def kl(logp_PK: Tensor, other_PK: Tensor) -> Tensor:
    """KL(π‖other) in nats per prompt; infinite where π says what the other never does."""
    return expectation(logp_PK, logp_PK - other_PK)


def entropy(logp_PK: Tensor) -> Tensor:
    """Entropy of a whole answer in nats, per prompt."""
    return expectation(logp_PK, -logp_PK)


def tilted(reference_PK: Tensor, reward_PK: Tensor, beta: float) -> Tensor:
    """log π*, the best law at this price of KL: π* ∝ π_ref·exp(r/β)."""
    return (reference_PK + reward_PK / beta).log_softmax(-1)


def best_value(reference_PK: Tensor, reward_PK: Tensor, beta: float) -> Tensor:
    """J* = β·log Σ_y π_ref(y)·exp(r(y)/β), per prompt."""
    return beta * torch.logsumexp(reference_PK + reward_PK / beta, -1)


def value(logp_PK: Tensor, reference_PK: Tensor, reward_PK: Tensor, beta: float) -> Tensor:
    """J(π) = Σ_y π(y)·(r(y) − β·log π(y)/π_ref(y)), per prompt."""
    return expectation(logp_PK, reward_PK - beta * (logp_PK - reference_PK))


def best_of(reference_PK: Tensor, reward_PK: Tensor, n: int) -> Tensor:
    """The law of the answer with the highest reward among n draws: F(≤r)ⁿ − F(<r)ⁿ, in logarithms.

    Rewards must differ; F is the reference's probability of a reward at most, or below, the answer's own.
    """
    order_PK = reward_PK.argsort(-1)
    sorted_PK = reference_PK.gather(-1, order_PK)
    upto_PK = sorted_PK.logcumsumexp(-1)
    below_PK = torch.cat([torch.full_like(upto_PK[:, :1], -math.inf), upto_PK[:, :-1]], -1)
    logp_PK = n * upto_PK + torch.log(-torch.expm1(n * (below_PK - upto_PK)))
    return torch.empty_like(logp_PK).scatter(-1, order_PK, logp_PK)


def surest(reward_PK: Tensor) -> Tensor:
    """The law that always gives the answer with the highest reward: what is left when KL costs nothing."""
    certain = torch.full_like(reward_PK, -math.inf)
    return certain.scatter(-1, reward_PK.argmax(-1, keepdim=True), 0.0)

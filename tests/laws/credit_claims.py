"""Claims about the credit of the online methods without a critic: slow definitions, and twins."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from palate import credit
from tests.laws.twins import MASK, Claim, Formula, altered, cells, claim, doubles, equal, filled, random, swapped


def check_group_spread(group_spread: Formula) -> None:
    equal(group_spread(doubles([0.5, -1.0, 2.0, 3.0, 3.0, 3.0]), 3), doubles([3.0, 3.0, 3.0, 0.0, 0.0, 0.0]))


def check_importance_weight(importance_weight: Formula) -> None:
    logp, sampled = random(3, 6, seed=1), random(3, 6, seed=2)
    for masked in (False, True):
        for whole in (False, True):
            expected = torch.zeros(3, 6, dtype=torch.float64)
            for b in range(3):
                ratios = {t: math.exp(logp[b, t]) / math.exp(sampled[b, t]) for t in cells(b)}
                for t in cells(b):
                    weight = math.prod(ratios.values()) if whole else ratios[t]
                    expected[b, t] = (0.0 if masked else 1.5) if weight > 1.5 else weight
            equal(importance_weight(filled(logp), filled(sampled, -3.0), MASK, 1.5, masked, whole), expected)
    assert not importance_weight(logp.clone().requires_grad_(), sampled, MASK, 1.5).requires_grad


def check_to_go(to_go: Formula) -> None:
    reward = random(3, 6)
    for gamma in (1.0, 0.9):
        expected = torch.zeros(3, 6, dtype=torch.float64)
        for b in range(3):
            for i, t in enumerate(cells(b)):
                expected[b, t] = sum(gamma**k * float(reward[b, later]) for k, later in enumerate(cells(b)[i:]))
        equal(to_go(filled(reward), MASK, gamma), expected)


def check_overlong_penalty(overlong_penalty: Formula) -> None:
    lengths = torch.tensor([1, 80, 85, 100, 130])
    equal(overlong_penalty(lengths, 100, 20), torch.tensor([0.0, 0.0, -0.25, -1.0, -1.0]))


def check_quantile_steps(quantile_steps: Formula) -> None:
    for steps in (2, 4, 7):
        equal(doubles(quantile_steps(0.7, 0.95, steps)), np.linspace(0.7, 0.95, steps))
        assert quantile_steps(0.7, 0.95, steps)[-1] == 0.95, "the end itself, whatever rounding does"
    assert quantile_steps(0.7, 0.95, 1) == [0.95]


def check_reaches_quantile(reaches_quantile: Formula) -> None:
    score = [0.1, 0.4, 0.4, 0.9, 1.0, 0.0, 0.0, 0.2, 0.2, 0.2, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    for quantile in (0.0, 0.3, 0.7, 0.95, 1.0):
        expected = []
        for g in range(0, len(score), 5):
            bar = float(np.quantile(score[g : g + 5], quantile))
            expected += [r >= bar or r == max(score[g : g + 5]) for r in score[g : g + 5]]
        equal(reaches_quantile(doubles(score), 5, quantile), expected)


def with_gradient(
    logp: Tensor, sampled: Tensor, mask: Tensor, cap: float, masked: bool = False, whole: bool = False
) -> Tensor:
    return credit.importance_weight(logp, sampled, mask, cap, masked, whole) + 0 * logp.masked_fill(~mask, 0.0)


def clipped_across_prompts(score: Tensor, group: int, quantile: float) -> Tensor:
    """trlX: bars of all prompts clipped by one another, so that a prompt of low scores may lose all of its answers."""
    bar_G = score.view(-1, group).quantile(quantile, -1)
    return score >= bar_G.clamp(bar_G.min() + 1e-3, bar_G.max() - 1e-3).repeat_interleave(group)


STEPS = {
    "never_there": lambda start, end, steps: [start + (end - start) / steps * i for i in range(steps)],  # trlX
    "at_once": lambda start, end, steps: [end] * steps,
    "downwards": lambda *args: credit.quantile_steps(*args)[::-1],
}
BARS = {
    "one_bar_for_all": altered(credit.reaches_quantile, group=20),
    "median": altered(credit.reaches_quantile, quantile=0.5),
    "above_only": lambda score, group, q: score > score.view(-1, group).quantile(q, -1).repeat_interleave(group),
    "below": lambda *args: ~credit.reaches_quantile(*args),
    "clipped_across_prompts": clipped_across_prompts,
}
CLAIMS = [
    claim(
        credit.group_spread,
        check_group_spread,
        one_group=altered(credit.group_spread, group=6),
        deviation=lambda reward, group: reward.view(-1, group).std(-1).repeat_interleave(group),
    ),
    claim(
        credit.importance_weight,
        check_importance_weight,
        "mask_BT",
        upside_down=swapped(credit.importance_weight),
        cap_removed=altered(credit.importance_weight, cap=math.inf),
        always_truncated=altered(credit.importance_weight, masked=False),
        always_per_token=altered(credit.importance_weight, whole=False),
        gradient_kept=with_gradient,
    ),
    claim(
        credit.to_go,
        check_to_go,
        "mask_BT",
        undiscounted=altered(credit.to_go, gamma=1.0),
        so_far=lambda reward, mask, gamma=1.0: reward.masked_fill(~mask, 0.0).cumsum(-1).masked_fill(~mask, 0.0),
    ),
    Claim(credit.quantile_steps, check_quantile_steps, STEPS),
    Claim(credit.reaches_quantile, check_reaches_quantile, BARS),
    claim(
        credit.overlong_penalty,
        check_overlong_penalty,
        hard_limit=lambda length, limit, cache: -(length >= limit).float(),
        cache_doubled=altered(credit.overlong_penalty, cache=40),
    ),
]

"""Claims about the credit of the online methods without a critic: slow definitions, and twins."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from palate import credit
from tests.laws.twins import MASK, Formula, altered, cells, claim, doubles, equal, filled, random, swapped


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


def with_gradient(
    logp: Tensor, sampled: Tensor, mask: Tensor, cap: float, masked: bool = False, whole: bool = False
) -> Tensor:
    return credit.importance_weight(logp, sampled, mask, cap, masked, whole) + 0 * logp.masked_fill(~mask, 0.0)


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
    claim(
        credit.overlong_penalty,
        check_overlong_penalty,
        hard_limit=lambda length, limit, cache: -(length >= limit).float(),
        cache_doubled=altered(credit.overlong_penalty, cache=40),
    ),
]

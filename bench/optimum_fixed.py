"""Where each method ends with endless data and a policy that can be anything: closed laws, and fixed points found.

A biased method is right when it ends at its own fixed point, so that is computed, for any world: from the law where one
is known, else by following the expected gradient of the method's formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from bench.optimum_rows import best_n
from palate import credit
from palate.settings import PalateError
from palate.worlds.enumerable import Rows, World, fixed_point
from palate.worlds.small import law, tree

GROUP, SETS, GRID = 8, 512, 48
SETTLED = 5e-3
"""The most of the gradient at π* that may be left at a fixed point."""
Estimator = Literal["k2", "k3"]


def wins(world: World) -> Tensor:
    """E σ(r(y) − r(y′)) over answers y′ of the reference, P×K: how often an answer wins."""
    reward_PK = world.reward_PK
    odds_PKK = torch.sigmoid(reward_PK[:, :, None] - reward_PK[:, None, :])
    return (odds_PKK @ world.reference_PK.exp()[..., None])[..., 0]


def per_token(start_PK: Tensor, worth_PK: Tensor) -> Tensor:
    """The law with (log π − start) / length = worth + c, c such that π sums to 1: where losses of averages rest."""
    length_K = tree.LENGTH_K.double()
    low_P1, high_P1 = torch.full((len(start_PK), 1), -500.0).double(), torch.full((len(start_PK), 1), 500.0).double()
    for _ in range(200):
        middle_P1 = (low_P1 + high_P1) / 2
        heavy_P1 = (start_PK + length_K * (worth_PK + middle_P1)).logsumexp(-1, keepdim=True) > 0
        low_P1, high_P1 = torch.where(heavy_P1, low_P1, middle_P1), torch.where(heavy_P1, middle_P1, high_P1)
    return (start_PK + length_K * (worth_PK + low_P1)).log_softmax(-1)


def expected_advantage(reward_PK: Tensor, drawn_PK: Tensor, group: int = GROUP, sets: int = SETS) -> Tensor:
    """E of an answer's `credit.within_group` over its siblings, P×K: what a finite group makes of each reward.

    By `sets` groups of siblings on a net of quasi-random numbers, the same at every call, for rewards on a grid;
    between them by straight lines.
    """
    uniform_SG = torch.quasirandom.SobolEngine(group - 1, scramble=True, seed=0).draw(sets, dtype=torch.float64)
    found = torch.empty_like(reward_PK)
    for x, (reward_K, drawn_K) in enumerate(zip(reward_PK, drawn_PK, strict=True)):
        sorted_K, order_K = reward_K.sort()
        upto_K = drawn_K.exp()[order_K].cumsum(0)
        place_SG = torch.searchsorted(upto_K, uniform_SG * upto_K[-1]).clamp(max=len(sorted_K) - 1)
        grid_N = torch.linspace(float(sorted_K[0]), float(sorted_K[-1]), GRID, dtype=torch.float64)
        own_NS1 = grid_N[:, None, None].expand(-1, sets, 1)
        groups_NSG = torch.cat([own_NS1, sorted_K[place_SG].expand(GRID, -1, -1)], -1)
        mean_N = credit.within_group(groups_NSG.flatten(), group).view(GRID, sets, group)[..., 0].mean(-1)
        at_K = (reward_K - grid_N[0]) / (grid_N[1] - grid_N[0])
        left_K = at_K.long().clamp(0, GRID - 2)
        found[x] = torch.lerp(mean_N[left_K], mean_N[left_K + 1], at_K - left_K)
    return found


def group_field(world: World, beta: float, estimator: Estimator, spread: bool) -> Callable[[Tensor], Tensor]:
    """The expected gradient of GRPO with KL as a loss, groups of 8; with `spread` as published, over group and length.

    Without spread an answer that counts in its own mean makes every advantage 7/8 of what an endless group gives.
    """
    kl = credit.kl_k3 if estimator == "k3" else credit.kl_k2

    def loss(logp_BT: Tensor, rows: Rows) -> Tensor:
        if spread:
            drawn_PK = rows.sampled_BT.sum(-1).view(tree.PROMPTS, -1)
            advantage_B = expected_advantage(world.reward_PK, drawn_PK).flatten()
        else:
            advantage_B = (rows.reward_B - rows.mean(rows.reward_B)) * (GROUP - 1) / GROUP
        kl_B = (kl(logp_BT, rows.reference_BT) * rows.real_BT).sum(-1)
        total_B = beta * kl_B - advantage_B * logp_BT.sum(-1)
        return total_B / rows.length_B if spread else total_B

    return lambda policy_PSV: world.problem.expected(policy_PSV, loss)


def _followed(estimator: Estimator, spread: bool, steps: int) -> Callable[[World, float], Tensor]:
    def find(world: World, beta: float) -> Tensor:
        field = group_field(world, beta, estimator, spread)
        start_PSV = tree.table_of(world.best(beta)).clamp(min=-60.0)
        found = fixed_point(field, start_PSV, steps=steps, tolerance=SETTLED / 5)
        if found.residual > SETTLED:
            raise PalateError(f"fixed point: {found.residual:.1e} of the gradient is left after {found.steps} steps.")
        return tree.answer_logp(found.logits_PSV)

    return find


def _best(world: World, beta: float) -> Tensor:
    return world.best(beta)


LAWS: Mapping[str, Callable[[World, float], Tensor]] = {
    **dict.fromkeys(
        (
            "rloo",
            "ppo",
            "reinforce++",
            "grpo, kl in reward",
            "grpo 1/len, kl in reward",
            "dr grpo, kl in reward",
            "online dpo, sampled labels",
            "online dpo, soft labels",
            "dpo",
            "dpo, soft labels",
        ),
        _best,
    ),
    "dr grpo, k2 loss": _followed("k2", False, 500),
    "dr grpo, k3 x ratio loss": _followed("k2", False, 500),
    "dr grpo, k3 loss": _followed("k3", False, 500),
    "grpo, k3 loss": _followed("k3", True, 1200),
    "online dpo, argmax labels": lambda world, _: world.surest(),
    "ipo, sum": lambda world, beta: law.tilted(world.reference_PK, wins(world), beta),
    "ipo, mean": lambda world, beta: per_token(world.reference_PK, wins(world) / beta),
    "best of n": lambda world, beta: world.best_of(best_n(beta)),
}
"""log π(y|x) at the end of each method, where it is known: P×K by row of the table."""


def ends(row: str, world: World, beta: float) -> float | None:
    """The score at a method's own end; none where that is not known."""
    return world.share(LAWS[row](world, beta), beta) if row in LAWS else None

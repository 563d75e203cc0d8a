"""What may go wrong in a policy gradient, and which of two exact tests sees it.

(a) at the optimum the expected gradient is zero; (b) at a random policy it is −∇J, in direction and length. Every
mutant is the library's own page with one thing changed around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.tabular import Online, expected, expected_of_pairs
from palate.algorithms import dpo, grpo, ppo, rloo
from palate.batches import Pairs, Rollouts, Tokens
from palate.worlds.enumerable import World
from palate.worlds.small import tree

ZERO, ALIKE = 1e-8, 1e-10
"""The largest (a) ‖g(π*)‖ / ‖g(π_ref)‖ and (b) 1 − cosine of a right page."""


def sound(beta: float) -> Online:
    """RLOO, as most mutants have it."""
    return Online(rloo.Algorithm(num_generations=2, kl_coef=beta))


def critic(beta: float, **settings: Any) -> Online:
    """PPO with values of zero and λ = 1, which is unbiased whatever the values."""
    return Online(ppo.Algorithm(kl_coef=beta, lam=1.0, whiten_advantages=False, **settings))


def group(beta: float, **settings: Any) -> Online:
    """Dr. GRPO with the KL in the reward."""
    plain = {"num_generations": 2, "scale_rewards": "none", "loss_type": "dr_grpo"}
    return Online(grpo.Algorithm(beta=beta, **{**plain, **settings}))


def _end(tokens: Tokens) -> Tensor:
    return tokens.action_BT & (tokens.tokens_BT == tree.END)


def _but(cut: Callable[[Tokens], Tensor]) -> Callable[[Rollouts], Tensor]:
    return lambda rollouts: rollouts.action_BT & ~cut(rollouts)


def _last(tokens: Tokens) -> Tensor:
    said_BT = tokens.action_BT
    return said_BT & (said_BT.cumsum(-1) == said_BT.sum(-1, keepdim=True))


def _first(tokens: Tokens) -> Tensor:
    return tokens.action_BT & (tokens.action_BT.cumsum(-1) == 1)


def _averaged(own_BT: Tensor, ref_BT: Tensor, tokens: Tokens) -> Tensor:
    return own_BT - (own_BT - ref_BT) / tokens.action_BT.sum(-1, keepdim=True)


def _deaf_to_end(own_BT: Tensor, ref_BT: Tensor, tokens: Tokens) -> Tensor:
    return torch.where(_end(tokens), own_BT, ref_BT)


def _backwards(own_BT: Tensor, ref_BT: Tensor, tokens: Tokens) -> Tensor:
    return 2 * own_BT - ref_BT


def _by_deviation(score_B: Tensor, rollouts: Rollouts, weight_B: Tensor) -> Tensor:
    mean = (weight_B * score_B).sum()
    return score_B / (weight_B * (score_B - mean).square()).sum().sqrt()


def _loss_without_end(batch: Any) -> Any:
    return replace(batch, action_BT=batch.action_BT & ~_end(batch))


def _turned(batch: Any) -> Any:
    return replace(batch, advantage_BT=-batch.advantage_BT)


@dataclass(frozen=True)
class Mutant:
    """A page with one fault, and the page without it."""

    wrong: Callable[[float], Online]
    right: Callable[[float], Online] = sound


MUTANTS: Mapping[str, Mutant] = {
    "none": Mutant(sound),
    **{f"β × {x:g}": Mutant(lambda beta, x=x: sound(beta * x)) for x in (0.5, 0.8, 1.25, 2.0)},
    "no KL at all": Mutant(lambda beta: sound(0.0)),
    "k1 as a loss": Mutant(lambda beta: group(beta, kl_in="loss", kl_estimator="k1"), group),
    "k2 in the reward": Mutant(lambda beta: critic(beta, kl_estimator="k2"), critic),
    "KL averaged over tokens": Mutant(lambda beta: replace(sound(beta), mishear=_averaged)),
    "EOS left out of the KL": Mutant(lambda beta: replace(sound(beta), mishear=_deaf_to_end)),
    "EOS left out of the loss": Mutant(lambda beta: replace(sound(beta), batch=_loss_without_end)),
    "EOS left out of both": Mutant(lambda beta: replace(sound(beta), said=_but(_end))),
    "EOS left out of both (PPO)": Mutant(lambda beta: replace(critic(beta), said=_but(_end)), critic),
    "last token dropped": Mutant(lambda beta: replace(sound(beta), said=_but(_last))),
    "first token dropped": Mutant(lambda beta: replace(sound(beta), said=_but(_first))),
    "reward 0 for truncated": Mutant(
        lambda beta: replace(sound(beta), score=lambda score_B, rollouts, _: score_B * rollouts.finished_B)
    ),
    "truncated answers masked": Mutant(lambda beta: group(beta, mask_truncated_completions=True), group),
    "reward clipped to ±1": Mutant(
        lambda beta: replace(sound(beta), score=lambda score_B, *_: score_B.clamp(-1.0, 1.0))
    ),
    "reward over batch deviation": Mutant(lambda beta: replace(sound(beta), score=_by_deviation)),
    "sign of the reward": Mutant(lambda beta: replace(sound(beta), score=lambda score_B, *_: -score_B)),
    "sign of the KL": Mutant(lambda beta: replace(sound(beta), mishear=_backwards)),
    "sign of the advantage": Mutant(lambda beta: replace(sound(beta), batch=_turned)),
    "sign of the advantage (PPO)": Mutant(lambda beta: replace(critic(beta), batch=_turned), critic),
    "γ .95 (PPO)": Mutant(lambda beta: critic(beta, gamma=0.95), critic),
}
"""By name; the last is a setting rather than a fault, and moves the optimum all the same."""


@dataclass(frozen=True)
class Verdict:
    """What the two tests read."""

    at_best: float
    """(a) ‖g(π*)‖ / ‖g(π_ref)‖ of the right page."""
    apart: float
    """(b) 1 − cosine to −∇J at a random policy."""
    length: float
    """(b) length there over that of the right page, which is −∇J's up to the page's own unit."""

    @property
    def seen_at_best(self) -> bool:
        """Whether (a) sees it."""
        return self.at_best > ZERO

    @property
    def seen_elsewhere(self) -> bool:
        """Whether (b) sees it."""
        return self.apart > ALIKE or abs(self.length - 1) > 1e-8


def random_policy(world: World, seed: int = 0) -> Tensor:
    """Logits P×S×V a standard normal away from the reference's."""
    random = torch.Generator().manual_seed(seed)
    noise_PSV = torch.randn(world.reference_PSV.shape, generator=random, dtype=torch.float64)
    return (world.reference_PSV + noise_PSV).log_softmax(-1)


def apart(one: Tensor, other: Tensor) -> float:
    """1 − cosine."""
    return 1.0 - float((one * other).sum() / (one.norm() * other.norm()))


def judge(mutant: Mutant, world: World, beta: float) -> Verdict:
    """Both tests of one mutant."""
    problem, policy_PSV = world.problem, random_policy(world)
    wrong, right = mutant.wrong(beta), mutant.right(beta)
    best_PSV = tree.table_of(world.best(beta))
    start = expected(right, problem, world.reference_PSV).norm()
    found_PSV, right_PSV = (expected(case, problem, policy_PSV) for case in (wrong, right))
    return Verdict(
        at_best=float(expected(wrong, problem, best_PSV).norm() / start),
        apart=apart(found_PSV, -problem.exact(policy_PSV, beta)),
        length=float(found_PSV.norm() / right_PSV.norm()),
    )


# pairs ------------------------------------------------------------------------------------------------


def _without_end(pairs: Pairs) -> Pairs:
    return replace(pairs, action_BKT=pairs.action_BKT & (pairs.tokens_BKT != tree.END))


def _swapped(pairs: Pairs) -> Pairs:
    return replace(pairs, probability_B=1 - pairs.probability_B)


def _sure(pairs: Pairs) -> Pairs:
    return replace(pairs, probability_B=torch.where(pairs.probability_B > 0.5, 1.0, 0.0).to(pairs.probability_B))


PAIR_MUTANTS: Mapping[str, tuple[Mapping[str, Any], Callable[[Pairs], Pairs] | None]] = {
    "none": ({}, None),
    "β × 1.25": ({"beta": 1.25}, None),
    "no reference": ({"reference_free": True}, None),
    "log-probabilities averaged": ({"logp_reduce": "mean"}, None),
    "EOS left out": ({}, _without_end),
    "labels turned round": ({}, _swapped),
    "the better answer always wins": ({}, _sure),
    "labels smoothed by .1 (cDPO)": ({"label_smoothing": 0.1}, None),
    "squared loss (IPO)": ({"loss_type": "ipo", "logp_reduce": "sum"}, None),
}
"""DPO with one thing changed: its settings (`beta` as a factor), or the pairs it is given."""


def judge_pairs(name: str, world: World, beta: float) -> float:
    """(a) of a mutant of DPO: ‖g(π*)‖ / ‖g(π_ref)‖."""
    given, change = PAIR_MUTANTS[name]
    settings = {**given, "beta": beta * float(given.get("beta", 1.0))}
    best_PSV, start_PSV = tree.table_of(world.best(beta)), world.reference_PSV
    found = expected_of_pairs(dpo.Algorithm(**settings), world.problem, best_PSV, change=change)
    return float(found.norm() / expected_of_pairs(dpo.Algorithm(beta=beta), world.problem, start_PSV).norm())

"""The two gradient laws: every page whose optimum is known rests there, and follows −∇J where it says so.

The pages themselves (`prepare` and `loss`) run on all 6,220 answers of the enumerable world in float64; only who speaks
is a table. Nothing here is random but the policy at which law (b) is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import mutants, tabular
from bench.mutants import ALIKE, ZERO, apart, critic, group, random_policy
from bench.optimum_fixed import expected_advantage, group_field, per_token, wins
from bench.tabular import (
    Online,
    expected,
    expected_of_demonstrations,
    expected_of_duels,
    expected_of_pairs,
    expected_of_thumbs,
)
from palate import credit
from palate.algorithms import cpo, dpo, kto, online_dpo, orpo, ppo, reinforce, rloo, sft, simpo
from palate.batches import Rollouts, Scored
from palate.worlds import enumerable
from palate.worlds.small import law, tree

WORLD = enumerable.world(1)
PROBLEM = WORLD.problem
START = WORLD.reference_PSV
Page = Callable[[float], Online]


def at_best(page: Page, beta: float, world: enumerable.World = WORLD, best: float | None = None) -> float:
    """‖g(π*)‖ / ‖g(π_ref)‖, π* for `best` where that is another β."""
    best_PSV = tree.table_of(world.best(best or beta))
    found, start = (expected(page(beta), world.problem, p).norm() for p in (best_PSV, world.reference_PSV))
    return float(found / start)


def plain_rloo(beta: float, **settings: Any) -> Online:
    return Online(rloo.Algorithm(num_generations=2, kl_coef=beta, **settings))


def plain_reinforce(beta: float, **settings: Any) -> Online:
    return Online(reinforce.Algorithm(kl_coef=beta, **{"whiten_advantages": False, **settings}))


def scaled(beta: float, **settings: Any) -> Online:
    return group(beta, **{"scale_rewards": "group", "loss_type": "dapo", **settings})


EXACT: dict[str, tuple[Page, float]] = {
    "rloo": (plain_rloo, 1.0),
    "rloo, a ratio per token": (lambda beta: plain_rloo(beta, action="token"), 1.0),
    "ppo": (critic, 0.0),
    "reinforce": (plain_reinforce, 0.0),
    "reinforce, greedy baseline (ReMax)": (lambda beta: plain_reinforce(beta, baseline="greedy"), 0.0),
    "dr. grpo": (group, 0.5 / tree.LONGEST),
    "grpo, mean over tokens": (lambda beta: group(beta, loss_type="dapo"), -0.5),
    "cispo": (lambda beta: group(beta, loss_type="dapo", surrogate="cispo"), -0.5),
}
"""Pages that follow −∇J, and how many times as long their gradient is.

0: over the mean length, for they average over tokens; negative: that and a share. An answer that counts in its own
baseline of two halves every advantage, and Dr. GRPO divides by the longest answer.
"""
SAME_WAY: dict[str, Page] = {
    "rloo, normalised": lambda beta: plain_rloo(beta, normalize_advantages=True),
    "ppo, whitened": lambda beta: Online(ppo.Algorithm(kl_coef=beta, lam=1.0)),
    "reinforce++": lambda beta: plain_reinforce(beta, whiten_advantages=True),
    "grpo over the batch's spread": lambda beta: group(beta, scale_rewards="batch"),
}
"""Pages that follow its direction: all advantages are divided by one number."""
SAME_END: dict[str, Page] = {
    "grpo": scaled,
    "grpo, mean of each answer": lambda beta: scaled(beta, loss_type="grpo"),
    "grpo, endless group": lambda beta: replace(scaled(beta), endless_group=True),
    "gspo": lambda beta: scaled(beta, loss_type="grpo", importance_level="sequence"),
}
"""Pages that go another way and end at the same place: there every advantage is 0."""
UNBIASED = {**{name: page for name, (page, _) in EXACT.items()}, **SAME_WAY, **SAME_END}


@pytest.mark.parametrize("name", UNBIASED)
def test_nothing_is_left_at_the_optimum(name: str):
    for beta in (0.1, 0.5):
        assert at_best(UNBIASED[name], beta) < ZERO


def test_nothing_is_left_at_the_optimum_of_another_world():
    world = enumerable.world(2)
    for page in (plain_rloo, critic, scaled):
        assert at_best(page, 0.5, world) < ZERO
        assert at_best(page, 0.5, world, best=0.51) > 1e-4


@pytest.mark.parametrize("name", EXACT)
def test_at_a_random_policy_the_gradient_is_minus_the_exact_one(name: str):
    page, share = EXACT[name]
    policy_PSV = random_policy(WORLD)
    rows = PROBLEM.rows(policy_PSV)
    mean_length = float((rows.weight_B * rows.length_B).sum())
    unit = share if share > 0 else (abs(share) or 1.0) / mean_length
    exact_PSV = -PROBLEM.exact(policy_PSV, 0.5)
    found_PSV = expected(page(0.5), PROBLEM, policy_PSV)
    assert apart(found_PSV, exact_PSV) < ALIKE
    assert float(found_PSV.norm() / exact_PSV.norm()) == pytest.approx(unit, rel=1e-10)


@pytest.mark.parametrize("name", SAME_WAY)
def test_at_a_random_policy_the_gradient_goes_the_exact_way(name: str):
    policy_PSV = random_policy(WORLD, 1)
    found_PSV = expected(SAME_WAY[name](0.5), PROBLEM, policy_PSV)
    assert apart(found_PSV, -PROBLEM.exact(policy_PSV, 0.5)) < ALIKE


def test_scaling_by_group_or_length_goes_another_way():
    policy_PSV = random_policy(WORLD)
    exact_PSV = -PROBLEM.exact(policy_PSV, 0.5)
    spread, short = SAME_END["grpo, endless group"], lambda beta: group(beta, loss_type="grpo")
    for page in (spread, short):
        assert apart(expected(page(0.5), PROBLEM, policy_PSV), exact_PSV) > 5e-3


def test_any_values_will_do_at_lambda_one_and_the_true_ones_at_any_lambda():
    policy_PSV = random_policy(WORLD)
    guess_PS = torch.randn(START.shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found_PSV = expected(critic(0.5), PROBLEM, policy_PSV, guess_PS)
    assert apart(found_PSV, -PROBLEM.exact(policy_PSV, 0.5)) < ALIKE
    sharp = Online(ppo.Algorithm(kl_coef=0.5, lam=0.9, whiten_advantages=False))
    assert apart(expected(sharp, PROBLEM, policy_PSV, guess_PS), -PROBLEM.exact(policy_PSV, 0.5)) > 1e-3
    found_PSV = expected(sharp, PROBLEM, policy_PSV, true_values(policy_PSV, 0.5))
    assert apart(found_PSV, -PROBLEM.exact(policy_PSV, 0.5)) < ALIKE


def true_values(policy_PSV: Tensor, beta: float) -> Tensor:
    """V(s) of score − β·KL to go, by one sweep up the tree."""
    logp_PSV = policy_PSV.log_softmax(-1)
    state_SV, answer_SV = tree.children()
    value_PS = torch.zeros(START.shape[:2], dtype=torch.float64)
    for states in tree.levels_from_below():
        onward_PNV = torch.where(
            answer_SV[states] >= 0, WORLD.reward_PK[:, answer_SV[states]], value_PS[:, state_SV[states]]
        )
        paid_PNV = beta * (logp_PSV - START)[:, states]
        value_PS[:, states] = (logp_PSV[:, states].exp() * (onward_PNV - paid_PNV)).sum(-1)
    return value_PS


# groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [plain_rloo, group], ids=["rloo", "dr. grpo"])
def test_a_sibling_of_average_worth_stands_for_all_siblings(page: Page):
    """What the laws rest on for methods of groups: E over every sibling of an answer's advantage, by enumeration."""
    algorithm, count = page(0.5).algorithm, len(tree.ANSWERS)
    policy_PSV = random_policy(WORLD)
    table, rows = tabular.Table(PROBLEM, policy_PSV), PROBLEM.rows(policy_PSV)
    tokens = tabular.every_answer()
    paid_B = 0.5 * (table.logp("policy", tokens) - table.logp("reference", tokens)).sum(-1).detach()
    worth_B = rows.reward_B - paid_B
    share_K = rows.weight_B[:count] / rows.weight_B[:count].sum()
    for answer in (0, 40, 1000):
        index = torch.stack([torch.full((count,), answer), torch.arange(count)], -1).flatten()
        picked = tokens.select(index)
        finished_B = torch.ones(2 * count, dtype=torch.bool)
        rollouts = Rollouts(**vars(picked), logp_BT=table.logp("policy", picked).detach(), finished_B=finished_B,
                            prompt_B=index * 0, version=0, limit=tree.LONGEST)  # fmt: skip
        nothing_BT = torch.zeros_like(rollouts.logp_BT)
        scored = Scored(rollouts, rows.reward_B[index], nothing_BT, {}, algorithm.memory())
        with torch.no_grad():
            batch = algorithm.prepare(table, scored)
        mean = float((share_K * batch.advantage_BT[::2, 1]).sum())
        whole = float(worth_B[answer] - rows.mean(worth_B)[answer])
        assert mean == pytest.approx(whole if algorithm.kind == "rloo" else whole / 2, rel=1e-10)


def test_a_groups_mean_without_the_kl_in_it_shifts_beta():
    """REINFORCE++ with its group baseline: an answer counts in its own mean, the KL does not: β k/(k − 1)."""

    def page(beta: float) -> Online:
        return plain_reinforce(beta, baseline="group", num_generations=2)

    assert at_best(page, 0.5) > 0.1
    assert at_best(page, 0.25, best=0.5) < ZERO
    assert at_best(page, 0.5, best=1.0) < ZERO


# biased by a known amount -----------------------------------------------------------------------------


def kl_loss(beta: float, estimator: str, **settings: Any) -> Online:
    return replace(group(beta, kl_in="loss", kl_estimator=estimator, **settings), endless_group=True)


@pytest.mark.parametrize(
    ("page", "left"),
    [
        (lambda beta: kl_loss(beta, "k2"), 0.21),
        (lambda beta: kl_loss(beta, "k3_ratio"), 0.21),
        (lambda beta: kl_loss(beta, "k3"), 0.39),
        (lambda beta: kl_loss(beta, "k3", scale_rewards="group", loss_type="grpo"), 0.75),
        (lambda beta: kl_loss(beta, "k1"), 0.53),
        (lambda beta: critic(beta, kl_estimator="k2"), 0.38),
    ],
    ids=["k2", "k3 times ratio", "k3", "k3 and spread", "k1", "k2 in the reward"],
)
def test_a_kl_loss_is_biased_by_as_much_as_is_known(page: Page, left: float):
    assert at_best(page, 0.5) == pytest.approx(left, rel=0.03)


def test_what_each_kl_loss_does_instead():
    policy_PSV = random_policy(WORLD)
    found = {e: expected(kl_loss(0.5, e), PROBLEM, policy_PSV) for e in ("k1", "k2", "k3", "k3_ratio")}
    free_PSV = expected(replace(group(0.0), endless_group=True), PROBLEM, policy_PSV)
    torch.testing.assert_close(found["k1"], free_PSV, rtol=0, atol=1e-14)
    torch.testing.assert_close(found["k3_ratio"], found["k2"], rtol=0, atol=1e-14)
    leaf_PSV = policy_PSV.clone().requires_grad_()
    logp_PSV = leaf_PSV.log_softmax(-1)
    reach_PS = tree.reach_logp(policy_PSV).exp() / tree.PROMPTS
    for estimator, (one, other) in {"k2": (logp_PSV, START), "k3": (START, logp_PSV)}.items():
        kl_PS = (one.exp() * (one - other)).sum(-1)
        (slope_PSV,) = torch.autograd.grad((reach_PS * kl_PS).sum(), leaf_PSV, retain_graph=True)
        torch.testing.assert_close(found[estimator] - free_PSV, 0.5 * slope_PSV / tree.LONGEST, rtol=0, atol=1e-14)


def test_the_fields_whose_fixed_points_are_published_are_those_of_the_pages():
    """bench/optimum_fixed.py writes GRPO's formulas once more, to be fast; without spread they are the page's."""
    policy_PSV = random_policy(WORLD)
    for estimator in ("k2", "k3"):
        page_PSV = expected(kl_loss(0.5 * 8 / 7, estimator), PROBLEM, policy_PSV)  # an endless group
        field_PSV = group_field(WORLD, 0.5, estimator, spread=False)(policy_PSV)
        torch.testing.assert_close(field_PSV, page_PSV * tree.LONGEST * 7 / 8, rtol=0, atol=1e-13)


def test_what_a_finite_group_makes_of_a_reward():
    """The mean over siblings, on a net of 512 groups, against 40,000 groups drawn by chance."""
    found_PK = expected_advantage(WORLD.reward_PK, WORLD.reference_PK)
    random = torch.Generator().manual_seed(1)
    share_K, reward_K = WORLD.reference_PK[3].exp(), WORLD.reward_PK[3]
    siblings_SG = reward_K[torch.multinomial(share_K, 7 * 40_000, True, generator=random)].view(-1, 7)
    for answer in (0, 40, 1000):
        own_S1 = reward_K[answer].expand(len(siblings_SG), 1)
        drawn = credit.within_group(torch.cat([own_S1, siblings_SG], -1).flatten(), 8).view(-1, 8)[:, 0].mean()
        assert float(found_PK[3, answer]) == pytest.approx(float(drawn), abs=0.02)


# pairs ------------------------------------------------------------------------------------------------


def left_of_pairs(best_PK: Tensor, **settings: Any) -> float:
    """The page on a part of all pairs, with exact labels: ‖g‖ at a law of answers over ‖g(π_ref)‖."""
    algorithm = dpo.Algorithm(**settings)
    found, start = (expected_of_pairs(algorithm, PROBLEM, p).norm() for p in (tree.table_of(best_PK), START))
    return float(found / start)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_rests_at_the_optimum(beta: float):
    assert left_of_pairs(WORLD.best(beta), beta=beta) < ZERO
    best_PSV = tree.table_of(WORLD.best(beta))
    sure = [expected_of_pairs(dpo.Algorithm(beta=beta), PROBLEM, p, soft=False).norm() for p in (best_PSV, START)]
    assert sure[0] < ZERO * sure[1]


def test_dpo_rests_there_whoever_wrote_the_pairs():
    """All 1,555² pairs of each prompt, drawn by the reference and, as online DPO has it, by the policy itself."""
    best_PSV, loss = tree.table_of(WORLD.best(0.5)), tabular.of_formula(dpo.Algorithm(beta=0.5))
    start = PROBLEM.expected_of_pairs(START, loss).norm()
    for drawn_PSV in (START, best_PSV):
        assert PROBLEM.expected_of_pairs(best_PSV, loss, drawn_PSV=drawn_PSV).norm() < ZERO * start


def test_robust_dpo_undoes_the_flips_it_is_told_of():
    best_PSV = tree.table_of(WORLD.best(0.5))
    loss = tabular.of_formula(dpo.Algorithm(beta=0.5, loss_type="robust", label_smoothing=0.1))
    flipped = [
        PROBLEM.expected_of_pairs(best_PSV, loss, lambda d, e=e: (1 - 2 * e) * torch.sigmoid(d) + e).norm()
        for e in (0.1, 0.0)
    ]
    assert flipped[0] < ZERO * flipped[1]


def best_of_divergence(name: str, beta: float) -> Tensor:
    """log π with βf′(π/π_ref) = r − λ, λ such that π sums to 1: what f-DPO says its optimum is."""
    short_PK = (WORLD.reward_PK.amax(-1, keepdim=True) - WORLD.reward_PK) / beta
    ratio = {
        "forward_kl": lambda gap_PK: 1 / gap_PK,
        "js": lambda gap_PK: 1 / torch.expm1(gap_PK),
        "alpha": lambda gap_PK: (1 + gap_PK / 2) ** -2,
    }[name]
    floor = -1.999999999 if name == "alpha" else 1e-12
    low_P1, high_P1 = torch.full((tree.PROMPTS, 1), floor), torch.full((tree.PROMPTS, 1), 1e3)
    low_P1, high_P1 = low_P1.double(), high_P1.double()
    for _ in range(200):
        middle_P1 = (low_P1 + high_P1) / 2
        heavy_P1 = (WORLD.reference_PK.exp() * ratio(short_PK + middle_P1)).sum(-1, keepdim=True) > 1
        low_P1, high_P1 = torch.where(heavy_P1, middle_P1, low_P1), torch.where(heavy_P1, high_P1, middle_P1)
    return WORLD.reference_PK + ratio(short_PK + high_P1).log()


@pytest.mark.parametrize("name", ["forward_kl", "js", "alpha"])
def test_f_dpo_rests_at_the_optimum_of_its_divergence(name: str):
    best_PK = best_of_divergence(name, 0.5)
    torch.testing.assert_close(best_PK.logsumexp(-1), torch.zeros(4).double(), rtol=0, atol=1e-9)
    assert left_of_pairs(best_PK, beta=0.5, f_divergence=name) < ZERO
    assert left_of_pairs(WORLD.best(0.5), beta=0.5, f_divergence=name) > 1e-2


def test_ipo_rests_at_a_utility_that_is_bounded():
    """π_ref · exp(E σ(r − r′) / β), the mean over answers of the reference."""
    best_PK = law.tilted(WORLD.reference_PK, wins(WORLD), 0.5)
    loss = tabular.of_formula(dpo.Algorithm(beta=0.5, loss_type="ipo", logp_reduce="sum"))
    found, wrong, start = (
        PROBLEM.expected_of_pairs(p, loss).norm()
        for p in (tree.table_of(best_PK), tree.table_of(WORLD.best(0.5)), START)
    )
    assert found < ZERO * start
    assert float(wrong / start) == pytest.approx(4.7, rel=0.03)
    assert WORLD.share(best_PK, 0.5) == pytest.approx(0.423, abs=1e-3)


def test_averages_rest_at_laws_of_their_own():
    """(log π − log π_ref) / length is r/β + c for DPO per token and E σ(r − r′)/β + c for IPO per token."""
    for settings, worth_PK in (
        ({"loss_type": "sigmoid_norm"}, WORLD.reward_PK / 0.5),
        ({"loss_type": "ipo"}, wins(WORLD) / 0.5),
    ):
        loss = tabular.of_formula(dpo.Algorithm(beta=0.5, **settings))
        best_PSV = tree.table_of(per_token(WORLD.reference_PK, worth_PK))
        found, start = (PROBLEM.expected_of_pairs(p, loss).norm() for p in (best_PSV, START))
        assert found < ZERO * start


def test_without_a_reference_the_start_is_uniform():
    """CPO without its cross-entropy ends at π ∝ exp(r/β), SimPO without a margin at log π / length = r/β + c."""
    nothing_PK = torch.zeros_like(WORLD.reference_PK)
    for algorithm, best_PK in (
        (cpo.Algorithm(beta=0.5, cpo_alpha=0.0), law.tilted(nothing_PK, WORLD.reward_PK, 0.5)),
        (simpo.Algorithm(beta=0.5, gamma=0.0), per_token(nothing_PK, WORLD.reward_PK / 0.5)),
    ):
        found, start = (
            expected_of_pairs(algorithm, PROBLEM, p, soft=False).norm() for p in (tree.table_of(best_PK), START)
        )
        assert found < ZERO * start


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_online_dpo_rests_at_the_optimum_unless_the_better_always_wins(beta: float):
    best_PSV = tree.table_of(WORLD.best(beta))
    for label, rests in (("soft", True), ("argmax", False)):
        algorithm = online_dpo.Algorithm(beta=beta, label=label)
        found, start = (expected_of_duels(algorithm, PROBLEM, p).norm() for p in (best_PSV, START))
        assert bool(found < ZERO * start) is rests


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"label_smoothing": 0.1}, 0.26),
        ({"loss_type": "ipo"}, 5.6),
        ({"loss_type": "hinge"}, 0.14),
        ({"loss_type": "exo_pair"}, 0.32),
        ({"loss_type": "apo_zero"}, 0.49),
    ],
    ids=["cDPO", "IPO per token", "hinge", "exo", "apo_zero"],
)
def test_other_pair_losses_go_elsewhere(settings: dict[str, Any], left: float):
    loss = tabular.of_formula(dpo.Algorithm(beta=0.5, **settings))
    found, start = (PROBLEM.expected_of_pairs(p, loss).norm() for p in (tree.table_of(WORLD.best(0.5)), START))
    assert float(found / start) == pytest.approx(left, rel=0.03)


@pytest.mark.parametrize("algorithm", [simpo.Algorithm(), orpo.Algorithm(), cpo.Algorithm()], ids=lambda a: a.kind)
def test_methods_without_a_reference_go_elsewhere(algorithm: Any):
    best_PSV = tree.table_of(WORLD.best(0.5))
    found, start = (expected_of_pairs(algorithm, PROBLEM, p, soft=False).norm() for p in (best_PSV, START))
    assert found > 0.5 * start


def test_kto_goes_elsewhere():
    best_PSV = tree.table_of(WORLD.best(0.5))
    found, start = (expected_of_thumbs(kto.Algorithm(beta=0.5), PROBLEM, p).norm() for p in (best_PSV, START))
    assert float(found / start) == pytest.approx(0.49, rel=0.03)


def test_fine_tuning_rests_at_the_law_of_its_data():
    for n in (4, 64):
        law_PK = WORLD.best_of(n)
        found, start = (
            expected_of_demonstrations(sft.Algorithm(), PROBLEM, p, law_PK).norm()
            for p in (tree.table_of(law_PK), START)
        )
        assert found < ZERO * start


# mutants ----------------------------------------------------------------------------------------------

BLIND = {
    "EOS left out of the loss",
    "first token dropped",
    "truncated answers masked",
    "sign of the advantage",
    "sign of the advantage (PPO)",
}
"""What (a) cannot see, since every advantage is 0 at the optimum: (b) must."""


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_every_mutant_is_caught(name: str):
    verdict = mutants.judge(mutants.MUTANTS[name], WORLD, 0.5)
    wrong = name != "none"
    assert verdict.seen_elsewhere is wrong
    assert verdict.seen_at_best is (wrong and name not in BLIND)
    if wrong:
        assert verdict.apart > 1e-5 or abs(verdict.length - 1) > 1e-2, "far from the threshold"


@pytest.mark.parametrize("name", mutants.PAIR_MUTANTS)
def test_every_mutant_of_pairs_is_caught(name: str):
    left = mutants.judge_pairs(name, WORLD, 0.5)
    assert left < ZERO if name == "none" else left > 0.1

"""Exact expected gradients: two ways to ∇J, the library's losses on all answers at once, and where they end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from palate import credit, losses
from palate.settings import PalateError
from palate.worlds import enumerable
from palate.worlds.enumerable import Rows, Side, fixed_point
from palate.worlds.small import tree
from palate.worlds.small.gradient import RowLoss

WORLD = enumerable.world(1)
PROBLEM = WORLD.problem


def random_policy(seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return WORLD.reference_PSV + torch.randn(WORLD.reference_PSV.shape, generator=random, dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    """1 − cosine."""
    return 1 - float((a * b).sum() / (a.norm() * b.norm()))


def leave_one_out(beta: float, last: float = 1.0, price: float = 1.0) -> RowLoss:
    """KL in the reward and the mean as baseline; `last` weighs the end token's place, `price` the KL."""

    def loss(logp_BT: Tensor, rows: Rows) -> Tensor:
        kl_B = credit.kl_k1(rows.sampled_BT, rows.reference_BT).sum(-1)
        worth_B = rows.reward_B - price * beta * kl_B
        advantage_BT = (worth_B - rows.mean(worth_B))[:, None].expand_as(logp_BT)
        cost_BT = losses.clipped_surrogate(logp_BT, rows.sampled_BT, advantage_BT, 0.2) * rows.real_BT
        weight_BT = torch.where(rows.answer_BT == tree.END, last, 1.0)
        return (cost_BT * weight_BT).sum(-1)

    return loss


def group_relative(beta: float, spread: bool) -> RowLoss:
    """Reward against the group's mean, and k3 as a loss; with `spread`, also over its deviation and by length."""

    def loss(logp_BT: Tensor, rows: Rows) -> Tensor:
        advantage_B = rows.reward_B - rows.mean(rows.reward_B)
        advantage_B = advantage_B / rows.deviation(rows.reward_B) if spread else advantage_B
        kl_B = (credit.kl_k3(logp_BT, rows.reference_BT) * rows.real_BT).sum(-1)
        total_B = beta * kl_B - advantage_B * logp_BT.sum(-1)
        return total_B / rows.length_B if spread else total_B

    return loss


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_two_ways_to_the_exact_gradient_agree(beta: float, seed: int):
    policy_PSV = random_policy(seed)
    exact_PSV = PROBLEM.exact(policy_PSV, beta)
    assert exact_PSV.norm() > 1e-2
    assert torch.allclose(exact_PSV, PROBLEM.by_autograd(policy_PSV, beta), rtol=0, atol=1e-12)
    assert exact_PSV.sum(-1).abs().max() < 1e-15  # a softmax does not feel what all logits of a state share


def test_the_exact_gradient_is_the_slope_of_the_value():
    policy_PSV, ahead_PSV = random_policy(2), random_policy(3) - WORLD.reference_PSV
    up, down = (
        WORLD.value(tree.answer_logp((policy_PSV + e * ahead_PSV).log_softmax(-1)), 0.5).mean() for e in (1e-5, -1e-5)
    )
    assert float((up - down) / 2e-5) == pytest.approx(
        float((PROBLEM.exact(policy_PSV, 0.5) * ahead_PSV).sum()), rel=1e-7
    )


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_nothing_is_left_at_the_optimum(beta: float):
    best_PSV = tree.table_of(WORLD.best(beta))
    for field in (lambda p: PROBLEM.exact(p, beta), lambda p: PROBLEM.expected(p, leave_one_out(beta))):
        assert field(best_PSV).norm() < 1e-12 * field(WORLD.reference_PSV).norm()


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_an_unbiased_loss_is_minus_the_exact_gradient(beta: float):
    policy_PSV = random_policy()
    found_PSV, exact_PSV = PROBLEM.expected(policy_PSV, leave_one_out(beta)), -PROBLEM.exact(policy_PSV, beta)
    assert apart(found_PSV, exact_PSV) < 1e-12
    assert torch.allclose(found_PSV, exact_PSV, atol=1e-13)


def test_faulty_losses_are_seen():
    """The end token left out of the loss is invisible at π* and plain at a random policy; β·1.25 at both."""
    best_PSV, policy_PSV = tree.table_of(WORLD.best(0.5)), random_policy()
    start = PROBLEM.exact(WORLD.reference_PSV, 0.5).norm()
    for faulty, at_best in ((leave_one_out(0.5, last=0.0), False), (leave_one_out(0.5, price=1.25), True)):
        assert bool(PROBLEM.expected(best_PSV, faulty).norm() > 1e-3 * start) is at_best
        assert apart(PROBLEM.expected(policy_PSV, faulty), -PROBLEM.exact(policy_PSV, 0.5)) > 1e-4


def test_rows_are_all_answers_as_heavy_as_they_are_likely():
    rows = PROBLEM.rows(random_policy())
    assert rows.weight_B.shape == (6220,)
    assert float(rows.weight_B.sum()) == pytest.approx(1, abs=1e-12)
    assert torch.equal(rows.real_BT.sum(-1), rows.length_B)
    assert not rows.sampled_BT[~rows.real_BT].any()
    at = 1555 + tree.NUMBER_OF[(3, 6)]
    assert (int(rows.prompt_B[at]), rows.answer_BT[at, :2].tolist()) == (1, [3, 6])
    assert rows.reward_B[at] == WORLD.reward_PK[1, tree.NUMBER_OF[(3, 6)]]
    reference = PROBLEM.rows(WORLD.reference_PSV)
    assert reference.mean(reference.reward_B).abs().max() < 1e-12
    assert reference.deviation(reference.reward_B).square().mean() == pytest.approx(1, abs=1e-12)


def test_a_loss_of_the_wrong_shape_is_refused():
    with pytest.raises(PalateError, match=r"the loss has shape \(6220, 4\). Give one number per row"):
        PROBLEM.expected(WORLD.reference_PSV, lambda logp_BT, _: logp_BT)


# pairs -----------------------------------------------------------------------------------------------


def sigmoid_loss(smoothing: float = 0.0):
    def loss(chosen: Side, rejected: Side) -> Tensor:
        return losses.dpo(chosen.logp, rejected.logp, chosen.reference, rejected.reference, 0.5, smoothing)

    return loss


def test_the_pair_gradient_is_the_sum_written_out():
    """∂/∂log π(y) = −2βw_y Σ_y′ w_y′ (σ(r − r′) − σ(β(h − h′))), carried to the logits one state at a time."""
    policy_PSV = random_policy()
    logp_PSV = policy_PSV.log_softmax(-1)
    expected_PSV = torch.zeros_like(policy_PSV)
    for x in range(tree.PROMPTS):
        w_K = WORLD.reference_PK[x].exp()
        h_K = 0.5 * (tree.answer_logp(logp_PSV)[x] - WORLD.reference_PK[x])
        r_K = WORLD.reward_PK[x]
        miss_KK = torch.sigmoid(r_K[:, None] - r_K) - torch.sigmoid(h_K[:, None] - h_K)
        slope_K = -2 * 0.5 * w_K * (miss_KK @ w_K) / tree.PROMPTS
        for t in range(tree.LONGEST):
            on_K = tree.REAL_KT[:, t]
            state_N, symbol_N = tree.STATE_KT[on_K, t], tree.ANSWER_KT[on_K, t]
            expected_PSV[x].index_put_((state_N, symbol_N), slope_K[on_K], accumulate=True)
            spread_NV = -slope_K[on_K, None] * logp_PSV[x, state_N].exp()
            expected_PSV[x].index_add_(0, state_N, spread_NV)
    found_PSV = PROBLEM.expected_of_pairs(policy_PSV, sigmoid_loss())
    assert torch.allclose(found_PSV, expected_PSV, rtol=0, atol=1e-13)
    assert found_PSV.norm() > 1e-3


def test_pairs_end_at_the_optimum_unless_their_labels_are_smoothed():
    best_PSV = tree.table_of(WORLD.best(0.5))
    start = PROBLEM.expected_of_pairs(WORLD.reference_PSV, sigmoid_loss()).norm()
    assert PROBLEM.expected_of_pairs(best_PSV, sigmoid_loss()).norm() < 1e-12 * start
    assert PROBLEM.expected_of_pairs(best_PSV, sigmoid_loss(0.1)).norm() > 0.1 * start


# fixed points ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "share", "steps"),
    [
        (leave_one_out(0.5), 1.0, 200),
        (group_relative(0.5, spread=False), 0.913, 500),
        (group_relative(0.5, spread=True), 0.785, 700),
    ],
    ids=["unbiased", "k3", "spread and k3"],
)
def test_fixed_points_are_the_published_ones(loss: RowLoss, share: float, steps: int):
    found = fixed_point(lambda policy_PSV: PROBLEM.expected(policy_PSV, loss), WORLD.reference_PSV, steps=steps)
    assert found.residual < 3e-4
    assert found.steps <= steps
    assert WORLD.share(tree.answer_logp(found.logits_PSV), 0.5) == pytest.approx(share, abs=5e-4)


def test_a_fixed_point_is_not_claimed_where_none_was_reached():
    found = fixed_point(lambda p: PROBLEM.expected(p, leave_one_out(0.5)), WORLD.reference_PSV, steps=3)
    assert found.steps == 3
    assert found.residual > 1e-3

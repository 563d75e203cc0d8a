"""Properties of the newer objectives of policies and of offline Q-learning.

Their definitions are in tests/laws/offline_claims.py, the golden numbers in test_golden_unpaired.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from palate import losses

MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]]).bool()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]


# --- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.05, 0.4, math.inf])
def test_the_sequence_ratio_is_that_of_the_paper(clip: float) -> None:
    """Averaged over an answer's tokens: value and gradient of the loss with one ratio per answer (eq. 5)."""
    old, advantage = -random(3, 6, seed=1).abs(), random(3, seed=2)
    new = (old + 0.3 * random(3, 6, seed=3)).requires_grad_()
    ratio_BT = losses.sequence_log_ratio(new, old, MASK)
    spread = advantage[:, None].expand(3, 6)
    tokens = losses.keep(losses.clipped_surrogate(ratio_BT, torch.zeros_like(old), spread, clip), MASK)
    ours = tokens.sum(-1) / MASK.sum(-1)
    whole = (((new - old) * MASK).sum(-1) / MASK.sum(-1)).exp()
    theirs = -torch.minimum(whole * advantage, whole.clamp(1 - clip, 1 + clip) * advantage)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, new), gradient(theirs, new))


def test_on_policy_the_newer_objectives_are_reinforce() -> None:
    """With p = p_old every one has the gradient −A ∇log p, the sequence ratio's per token of an averaged answer."""
    logp, advantage = (-random(3, 6, seed=1).abs()).requires_grad_(), random(3, 1, seed=2).expand(3, 6)
    old = logp.detach()
    for loss in (
        losses.cispo(logp, old, advantage, 0.2),
        losses.clipped_surrogate(logp, old, advantage, 0.2, 0.3, 3.0),
        losses.clipped_surrogate(losses.sequence_log_ratio(logp, old, MASK), 0 * old, advantage, 0.2),
    ):
        torch.testing.assert_close(gradient(losses.keep(loss, MASK), logp), torch.where(MASK, -advantage, 0.0))


def test_a_clipped_weight_keeps_its_token() -> None:
    """A good token whose ratio left the clip: PPO drops it, CISPO keeps it with the weight of the bound."""
    logp, old, up = torch.tensor([2.0], requires_grad=True), torch.zeros(1), torch.ones(1)
    assert gradient(losses.clipped_surrogate(logp, old, up, 0.2), logp).item() == 0
    assert gradient(losses.cispo(logp, old, up, 0.2), logp).item() == pytest.approx(-1.2)


def test_the_second_clip_rests_where_a_bad_answer_became_likely() -> None:
    logp, old, down = torch.tensor([1.0, 1.2], requires_grad=True), torch.zeros(2), -torch.ones(2)
    loss = losses.clipped_surrogate(logp, old, down, 0.2, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([math.e, 3.0])  # e^1.2 = 3.3
    assert gradient(loss, logp).tolist() == pytest.approx([math.e, 0.0])


@pytest.mark.parametrize("far", [800.0, -800.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_overflows(dtype: torch.dtype, far: float) -> None:
    x = torch.full((2, 3), far, dtype=dtype, requires_grad=True)
    old, here = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=torch.bool)
    q = torch.stack([x, -x], -1)
    terms = losses.ilql(q, -q.detach(), x, old, old, x, here, 0.7, 0.99, 0.1, 1.0, 1.0, torch.zeros(2, 3).long())
    found = {
        "cispo": losses.cispo(x, old, -torch.ones(2, 3), math.inf),
        "sequence": losses.clipped_surrogate(losses.sequence_log_ratio(x, old, here), old, -torch.ones(2, 3), 0.2),
        "decoding": losses.ilql_logits(q, -q, x, 1.0),
        **{name: term for name, term in terms.items() if name != "total"},
    }
    for name, loss in found.items():
        assert loss.dtype == torch.float32, name
        assert torch.isfinite(loss).all(), name
        assert torch.isfinite(gradient(loss, x)).all(), name


# --- offline Q-learning ----------------------------------------------------------------------------------------------


def test_an_expectile_is_where_the_error_rests() -> None:
    """τ = ½ rests at the mean; τ near 1 near the largest value that the data hold."""
    q = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    for tau, rest in ((0.5, 2.0), (0.999999, 5.0), (0.000001, 0.0)):
        v = torch.tensor(rest, dtype=torch.float64, requires_grad=True)
        assert gradient(losses.expectile_error(q - v, tau), v).abs() < 2e-5
    torch.testing.assert_close(losses.expectile_error(q, 0.5), q.square() / 2)


def test_the_next_action_may_be_far() -> None:
    value = torch.tensor([[9.0, 1.0, 2.0, 9.0, 3.0, 9.0]])
    assert losses.next_value(value, MASK[:1]).tolist() == [[0.0, 2.0, 3.0, 0.0, 0.0, 0.0]]
    assert losses.next_value(value, torch.zeros(1, 6)).tolist() == [[0.0] * 6]


def ilql(heads: int, mask: Tensor, action: Tensor, **changes: Tensor) -> dict[str, Tensor]:
    """Stacked heads of random numbers."""
    shape = mask.shape
    x = {name: random(*shape, seed=seed) for seed, name in enumerate(("v_BT", "next_v_BT", "reward_BT", "logp_BT"))}
    q, target = random(heads, *shape, 4, seed=5), random(heads, *shape, 4, seed=6)
    return losses.ilql(
        q, target, mask_BT=mask, action_BT=action, tau=0.7, gamma=0.9, cql_weight=0.1, awac_weight=1.0, beta=1.0,
        **{**x, **changes},
    )  # fmt: skip


ACTION = torch.tensor([[0, 1, 2, 3, 0, 1]] * 3)


def test_heads_stacked_listed_or_alone() -> None:
    q, target = random(2, 3, 6, 4, seed=5), random(2, 3, 6, 4, seed=6)
    rest = [random(3, 6, seed=seed) for seed in range(4)]
    more = (MASK, 0.7, 0.9, 0.1, 1.0, 1.0, ACTION)
    stacked = losses.ilql(q, target, *rest, *more)
    listed = losses.ilql(list(q), tuple(target), *rest, *more)
    one, alone = losses.ilql(q[:1], target[:1], *rest, *more), losses.ilql(q[0], target[0], *rest, *more)
    flat = losses.ilql(
        q[:, MASK], target[:, MASK], *(x[MASK] for x in rest), torch.ones(10), 0.7, 0.9, 0.1, 1.0, 1.0, ACTION[MASK]
    )
    for name, term in stacked.items():
        assert torch.equal(term, listed[name])
        assert torch.equal(one[name], alone[name])
        torch.testing.assert_close(term[MASK], flat[name])


def test_actions_off_the_mask_may_be_anything() -> None:
    clean = ilql(2, MASK, ACTION)
    dirty = ilql(2, MASK, ACTION.masked_fill(~MASK, -100))
    for name, term in clean.items():
        assert torch.equal(term, dirty[name])
    nothing = ilql(2, torch.zeros_like(MASK), ACTION)
    assert not any(term.any() for term in nothing.values())


def test_without_beta_it_is_behaviour_cloning() -> None:
    logp = (-random(3, 6).abs()).requires_grad_()
    q = random(3, 6, 4, seed=5)
    rest = [random(3, 6, seed=seed) for seed in range(3)]
    terms = losses.ilql(q, q, *rest, logp, MASK, 0.7, 0.9, 0.0, 1.0, 0.0, ACTION)
    assert torch.equal(terms["awac"], losses.cross_entropy(logp, MASK))


def test_decoding_shifts_towards_the_better_action() -> None:
    logits, q, v = random(5, 4), random(2, 5, 4, seed=1), random(5, seed=2)
    torch.testing.assert_close(losses.ilql_logits(logits, q, v, 0.0), logits.log_softmax(-1))
    greedy = losses.ilql_logits(logits, q, v, 1e6).argmax(-1)
    assert torch.equal(greedy, q.amin(0).argmax(-1))
    some, other = (losses.ilql_logits(logits, q, x, 2.0).softmax(-1) for x in (v, v + 3))
    torch.testing.assert_close(some, other)

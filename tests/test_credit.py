"""Laws of credit assignment: masks, padding, moments, baselines, estimators, controllers.

The formulas against their definitions are in tests/laws/test_sabotaged_twins.py and in the golden tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from palate import credit
from palate.settings import PalateError

LAW = settings(deadline=None, derandomize=True, database=None, max_examples=40)
GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -1e30]
MASKS = st.lists(st.booleans(), min_size=12, max_size=12).map(lambda bits: torch.tensor(bits).view(2, 6))
FRACTIONS = st.floats(0, 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gae(mask: Tensor, reward: Tensor, value: Tensor) -> Tensor:
    return credit.gae(reward, value, mask, 0.9, 0.8)


def whiten(mask: Tensor, x: Tensor) -> Tensor:
    return credit.whiten(x, mask)


def whiten_in_place(mask: Tensor, x: Tensor) -> Tensor:
    return credit.whiten(x, mask, shift_mean=False)


def last(mask: Tensor, logp: Tensor, ref: Tensor) -> Tensor:
    return credit.shape_reward(torch.tensor([2.0, -1.0], dtype=torch.float64), logp, ref, mask, 0.1)


MASKED = [gae, whiten, whiten_in_place, last]


@pytest.mark.parametrize("formula", MASKED, ids=lambda f: f.__name__)
@LAW
@given(mask=MASKS, garbage=st.sampled_from(GARBAGE))
def test_masked_cells_may_hold_anything(formula: Callable[..., Tensor], mask: Tensor, garbage: float) -> None:
    found: list[list[Tensor]] = []
    for filling in (0.0, garbage):
        count = formula.__code__.co_argcount - 1
        leaves = [random(2, 6, seed=s).masked_fill(~mask, filling).requires_grad_() for s in range(count)]
        result = formula(mask, *leaves)
        found.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)
        assert torch.isfinite(dirty).all()
        assert (dirty[~mask] == 0).all()


@pytest.mark.parametrize("formula", MASKED, ids=lambda f: f.__name__)
@LAW
@given(mask=MASKS, left=st.integers(0, 4), right=st.integers(0, 4))
def test_padding_side_and_amount_never_matter(
    formula: Callable[..., Tensor], mask: Tensor, left: int, right: int
) -> None:
    inputs = [random(2, 6, seed=s) for s in range(formula.__code__.co_argcount - 1)]
    wide = formula(F.pad(mask, (left, right)), *(F.pad(x, (left, right), value=math.nan) for x in inputs))
    torch.testing.assert_close(wide, F.pad(formula(mask, *inputs), (left, right)), rtol=1e-12, atol=1e-12)


# --- advantages ------------------------------------------------------------------------------------------------------


def by_definition(reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    """Â_t as the sum over what follows, not as the recursion."""
    after = [*value[1:], 0.0][: len(value)]
    delta = [r + gamma * n - v for r, n, v in zip(reward, after, value, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


@LAW
@given(mask=MASKS, gamma=FRACTIONS, lam=FRACTIONS, seed=st.integers(0, 1000))
def test_gae_is_its_sum(mask: Tensor, gamma: float, lam: float, seed: int) -> None:
    reward, value = random(2, 6, seed=seed), random(2, 6, seed=seed + 1)
    found = credit.gae(reward, value, mask, gamma, lam)
    for row in range(2):
        here = mask[row]
        expected = by_definition(reward[row][here].tolist(), value[row][here].tolist(), gamma, lam)
        assert found[row][here].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert not found[row][~here].any()


def by_recursion(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> Tensor:
    """Â_t = δ_t + γλ Â_{t+1}, one place after the other from the end; places off the mask are passed over."""
    advantage_B, next_value_B = torch.zeros_like(reward_BT[:, 0]), torch.zeros_like(value_BT[:, 0])
    found: list[Tensor] = []
    for t in reversed(range(reward_BT.shape[1])):
        here_B = mask_BT[:, t]
        surprise_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        advantage_B = torch.where(here_B, surprise_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(here_B, value_BT[:, t], next_value_B)
        found.append(torch.where(here_B, advantage_B, 0.0))
    return torch.stack(found[::-1], 1)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 53, 1000])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.99, 0.0), (0.0, 0.9)])
def test_gae_of_long_rows_is_the_recursion(length: int, gamma: float, lam: float) -> None:
    reward, value = random(5, length, seed=1), random(5, length, seed=2)
    mask = torch.rand(5, length, generator=torch.Generator().manual_seed(3)) < 0.8
    mask[0], mask[1] = True, False
    expected = by_recursion(reward, value, mask, gamma, lam)
    torch.testing.assert_close(credit.gae(reward, value, mask, gamma, lam), expected, rtol=1e-12, atol=1e-12)
    if length > 2 and gamma * lam:
        other = by_recursion(reward, value, mask, gamma, lam - 1e-9)
        assert not torch.allclose(credit.gae(reward, value, mask, gamma, lam), other, rtol=1e-12, atol=1e-12)


def test_full_rows_and_answer_slices_agree() -> None:
    """[prompt | answer | pad] rows give what the sliced answers give."""
    reward, value = random(3, 10, seed=1), random(3, 10, seed=2)
    place = torch.arange(10)
    mask = (place >= 4) & (place < torch.tensor([[7], [10], [5]]))
    full = credit.gae(reward, value, mask, 1.0, 0.95)
    torch.testing.assert_close(full[:, 4:], credit.gae(reward[:, 4:], value[:, 4:], mask[:, 4:], 1.0, 0.95))


def test_values_behind_the_answer_count_once_when_the_mask_reaches_them() -> None:
    """TL;DR: the value mask goes one place past the last token, whose value is then the successor of the last."""
    reward, value = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 4.0, 64.0]])
    two, three = torch.tensor([[1, 1, 0, 0]]).bool(), torch.tensor([[1, 1, 1, 0]]).bool()
    assert credit.gae(reward, value, two, 1.0, 0.0).tolist() == [[1.0, -2.0, 0.0, 0.0]]
    assert credit.gae(reward, value, three, 1.0, 0.0).tolist() == [[1.0, 2.0, -4.0, 0.0]]


@LAW
@given(mask=MASKS.filter(lambda m: int(m.sum()) > 1), scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_whitening_moments(mask: Tensor, scale: float, shift: float) -> None:
    x = random(2, 6) * scale + shift
    inside = credit.whiten(x, mask)[mask]
    assert inside.mean().item() == pytest.approx(0.0, abs=1e-9)
    variance = x[mask].var(correction=0).item()
    assert inside.var(correction=0).item() == pytest.approx(variance / (variance + 1e-8), rel=1e-6)
    kept = credit.whiten(x, mask, shift_mean=False)[mask]
    assert kept.mean().item() == pytest.approx(x[mask].mean().item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("level", [1000.1, -0.3, 3e6])
def test_equal_numbers_whiten_to_zero(level: float) -> None:
    """In float32 the mean of equal numbers is off by a rounding; 1/√1e-8 would blow that up to order 1."""
    x = torch.full((7, 13), level)
    assert credit.whiten(x).abs().max() < 1e-3
    assert credit.within_group(x.flatten()[:90], 9).abs().max() < 1e-3
    torch.testing.assert_close(credit.whiten(x, shift_mean=False), x)


def test_an_empty_mask_whitens_to_zeros() -> None:
    x = random(2, 3)
    assert not credit.whiten(x, torch.zeros(2, 3).bool()).any()
    assert not credit.whiten(x, torch.zeros(2, 3).bool(), shift_mean=False).any()


# --- baselines -------------------------------------------------------------------------------------------------------


@LAW
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_baselines_by_prompt_index(sizes: list[int], seed: int) -> None:
    """Groups of unequal size, their rows in any order."""
    prompts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) * 3 + 1
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    prompts, reward = prompts[order], random(len(prompts), seed=seed)
    centred = credit.within_group(reward, prompts, scale=False)
    scaled = credit.within_group(reward, prompts)
    others = credit.leave_one_out(reward, prompts)
    for row, prompt in enumerate(prompts):
        near = reward[prompts == prompt]
        alone = len(near) == 1
        assert centred[row].item() == pytest.approx((reward[row] - near.mean()).item(), abs=1e-12)
        deviation = math.sqrt(near.var(correction=0).item() + 1e-8)
        assert scaled[row].item() == pytest.approx(centred[row].item() / deviation, abs=1e-9)
        rest = reward[row] if alone else (near.sum() - reward[row]) / (len(near) - 1)
        assert others[row].item() == pytest.approx((reward[row] - rest).item(), abs=1e-12)


def test_leave_one_out_is_a_stretched_group_mean() -> None:
    """r − mean of the others = K/(K−1) · (r − mean of all)."""
    reward = random(12)
    stretched = credit.within_group(reward, 4, scale=False) * 4 / 3
    torch.testing.assert_close(credit.leave_one_out(reward, 4), stretched)


@pytest.mark.parametrize("group", [5, 0, -2])
def test_rewards_divide_into_groups(group: int) -> None:
    with pytest.raises(ValueError, match="12 rewards"):
        credit.within_group(random(12), group)


# --- KL --------------------------------------------------------------------------------------------------------------


@LAW
@given(
    policy=st.lists(st.floats(-3, 3), min_size=4, max_size=4), other=st.lists(st.floats(-3, 3), min_size=4, max_size=4)
)
def test_k1_and_k3_are_unbiased(policy: list[float], other: list[float]) -> None:
    logp, ref = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (policy, other))
    exact = (logp.exp() * (logp - ref)).sum().item()
    for estimator in (credit.kl_k1, credit.kl_k3):
        assert (logp.exp() * estimator(logp, ref)).sum().item() == pytest.approx(exact, abs=1e-12)


@LAW
@given(gap=st.floats(-900, 900), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_k2_and_k3_are_never_negative(gap: float, dtype: torch.dtype) -> None:
    logp = torch.tensor([gap], dtype=dtype)
    assert (credit.kl_k2(logp, torch.zeros_like(logp)) >= 0).all()
    assert (credit.kl_k3(logp, torch.zeros_like(logp)) >= -1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("far", [800.0, -800.0])
def test_nothing_overflows_at_800(dtype: torch.dtype, far: float) -> None:
    for other in (0.0, -far):
        x = torch.full((2, 3), far, dtype=dtype, requires_grad=True)
        y = torch.full((2, 3), other, dtype=dtype, requires_grad=True)
        mask, mixed = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), torch.stack([x[0], y[1]])
        found = {
            "k1": credit.kl_k1(x, y),
            "k2": credit.kl_k2(x, y),
            "k3": credit.kl_k3(x, y),
            "gae": credit.gae(x, y, mask, 1.0, 0.95),
            "whiten": credit.whiten(mixed, mask),
            "group": credit.within_group(mixed.flatten(), 3),
            "others": credit.leave_one_out(mixed.flatten(), 3),
            "reward": credit.shape_reward(x[:, 0], x, y, mask, 0.1),
        }
        for name, value in found.items():
            assert value.dtype == torch.float32, name
            assert torch.isfinite(value).all(), name
            for slope in torch.autograd.grad(value.sum(), (x, y), allow_unused=True, retain_graph=True):
                assert slope is None or torch.isfinite(slope).all(), name


def test_k3_far_out_still_pulls_the_policy_up() -> None:
    """Where p ≪ p_ref the gradient must raise log p, however far away it is."""
    logp = torch.tensor([-800.0, -60.0, -1.0], requires_grad=True)
    (slope,) = torch.autograd.grad(credit.kl_k3(logp, torch.zeros(3)).sum(), logp)
    assert (slope < 0).all()
    assert slope[0].item() == pytest.approx(slope[1].item(), rel=1e-4)  # both beyond the bound
    assert slope[2].item() == pytest.approx(1 - math.e, rel=1e-6)


def test_gradients_are_derivatives() -> None:
    x, y = random(2, 4, seed=1).requires_grad_(), random(2, 4, seed=2).requires_grad_()
    mask, score = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool(), random(2, seed=3).requires_grad_()
    for estimator in (credit.kl_k1, credit.kl_k2, credit.kl_k3):
        assert torch.autograd.gradcheck(estimator, (x, y))
    assert torch.autograd.gradcheck(lambda r, v: credit.gae(r, v, mask, 0.9, 0.8), (x, y))
    assert torch.autograd.gradcheck(lambda r: credit.whiten(r, mask), (x,))
    assert torch.autograd.gradcheck(lambda s, p, q: credit.shape_reward(s, p, q, mask, 0.1), (score, x, y))
    assert torch.autograd.gradcheck(lambda r: credit.within_group(r.flatten(), 4), (x,))
    assert torch.autograd.gradcheck(lambda r: credit.leave_one_out(r.flatten(), 4), (x,))


# --- rewards and controllers -----------------------------------------------------------------------------------------


@LAW
@given(mask=MASKS, beta=st.floats(0, 2), position=st.sampled_from(["last", "after"]))
def test_shaped_rewards_add_up(mask: Tensor, beta: float, position: str) -> None:
    """Over a row: the score minus β times the row's KL, wherever the score is put."""
    logp, ref, score = random(2, 6, seed=1), random(2, 6, seed=2), torch.tensor([2.0, -1.0], dtype=torch.float64)
    shaped = credit.shape_reward(score, logp, ref, mask, beta, position)  # type: ignore[arg-type]
    kl = ((logp - ref) * mask).sum(-1)
    expected = torch.where(mask.any(-1), score - beta * kl, 0.0)
    torch.testing.assert_close(shaped.sum(-1), expected)


def test_where_the_score_lands() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    zero, score = torch.zeros(3, 5), torch.tensor([1.0, 2.0, math.nan])
    at_last = credit.shape_reward(score, zero, zero, mask, 0.1)
    after = credit.shape_reward(score, zero, zero, mask, 0.1, "after")
    assert at_last.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 2], [0, 0, 0, 0, 0]]
    assert after.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 2], [0, 0, 0, 0, 0]]


def test_unknown_words_are_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="position"):
        credit.shape_reward(x[:, 0], x, x, x.bool(), 0.1, "first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="how"):
        credit.missing_eos_penalty(x[0], x[0].bool(), 1.0, "add")  # type: ignore[arg-type]


def test_rewards_that_do_not_vary_have_no_gain() -> None:
    for rewards in (torch.full((8,), 0.25), torch.tensor([0.25, math.nan])):
        with pytest.raises(PalateError, match="standard deviation"):
            credit.gain_and_bias(rewards)
    assert credit.gain_and_bias(torch.full((8,), 0.25), std=None) == (1.0, -0.25)


@LAW
@given(
    kl=st.floats(-50, 200),
    steps=st.integers(1, 1000),
    initial=st.floats(1e-4, 10),
    target=st.floats(0.1, 20),
)
def test_the_controller_steers_towards_its_target(kl: float, steps: int, initial: float, target: float) -> None:
    controller = credit.AdaptiveKL(initial, target, 10_000)
    found = controller.update(torch.tensor(kl, dtype=torch.float64), steps)
    assert found == controller.value
    assert abs(found / initial - 1) <= 0.2 * steps / 10_000 + 1e-12
    assert (found - initial) * (kl - target) >= 0


def test_controllers_at_their_edges() -> None:
    with pytest.raises(ValueError, match="nan"):
        credit.AdaptiveKL(0.1, 6.0, 10_000).update(math.nan, 64)
    with pytest.raises(ValueError, match="target"):
        credit.AdaptiveKL(0.1, 0.0, 10_000)
    fixed = credit.FixedKL(0.05)
    assert fixed.update(100.0, 512) == fixed.value == 0.05

"""Properties of the objectives of pairs and of single labelled answers: where they rest, what leaves them unmoved.

Their definitions are in tests/laws/preference_claims.py, the golden numbers in test_golden_preference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from palate import losses

Formula = Callable[..., Tensor]
LAW = settings(deadline=None, derandomize=True, database=None, max_examples=30)
BETA = 0.1

OF_THE_GAIN: dict[str, Formula] = {
    "dpo": losses.dpo,
    "cdpo": partial(losses.dpo, label_smoothing=0.1),
    "soft": partial(losses.soft_dpo, target=0.7),
    "robust": partial(losses.robust_dpo, label_smoothing=0.1),
    "hinge": losses.hinge,
    "ipo": losses.ipo,
    "exo": partial(losses.exo_pair, label_smoothing=0.1),
    "discopop": losses.discopop,
}
"""Losses that see the four log-probabilities through h alone."""
PAIRED: dict[str, Formula] = {
    **OF_THE_GAIN,
    "nca": losses.nca_pair,
    "bco": partial(losses.bco_pair, shift=0.2),
    "sppo": losses.sppo_hard,
    "apo zero": losses.apo_zero,
    "apo down": losses.apo_down,
    "dpop": losses.dpop,
    "forward kl": partial(losses.f_dpo, divergence="forward_kl"),
    "js": partial(losses.f_dpo, divergence="js"),
    "alpha": partial(losses.f_dpo, divergence="alpha", alpha=0.5),
}
BATCHED: dict[str, Formula] = {**PAIRED, "aot": losses.aot, "aot unpaired": losses.aot_unpaired}


def simple(formula: Formula) -> Formula:
    """A loss without a reference, called like the others."""
    return lambda c, r, qc, qr, beta: formula(c, r) + 0 * (qc + qr)


FREE: dict[str, Formula] = {
    "cpo": simple(partial(losses.cpo, beta=BETA, label_smoothing=0.1)),
    "simpo": simple(partial(losses.simpo, beta=2.0, gamma=1.0)),
    "slic": simple(losses.slic),
}
EVERY = {**BATCHED, **FREE}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def four(rows: int = 6) -> list[Tensor]:
    return [5 * random(rows, seed=seed) - 20 for seed in range(1, 5)]


def slope_at(formula: Formula, gain: float, beta: float = BETA) -> float:
    """dL/dh where the chosen answer has gained `gain` and the rejected one nothing."""
    zero = torch.zeros((), dtype=torch.float64)
    chosen = torch.tensor(gain, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(formula(chosen, zero, zero, zero, beta), chosen)[0].item()


# --- where a loss rests ----------------------------------------------------------------------------------------------


@LAW
@given(beta=st.floats(0.01, 5.0))
def test_ipo_rests_at_its_margin(beta: float) -> None:
    assert slope_at(losses.ipo, 1 / (2 * beta), beta) == pytest.approx(0, abs=1e-9)
    assert slope_at(losses.ipo, 0.9 / (2 * beta), beta) < 0 < slope_at(losses.ipo, 1.1 / (2 * beta), beta)


@LAW
@given(beta=st.floats(0.01, 5.0), wrong=st.floats(0.01, 0.45))
@pytest.mark.parametrize("formula", [losses.dpo, losses.exo_pair], ids=["cdpo", "exo"])
def test_smoothed_labels_rest_at_their_probability(formula: Formula, beta: float, wrong: float) -> None:
    rest = math.log((1 - wrong) / wrong) / beta
    smoothed = partial(formula, label_smoothing=wrong)
    assert slope_at(smoothed, rest, beta) == pytest.approx(0, abs=1e-12)
    assert slope_at(smoothed, 0.9 * rest, beta) < 0 < slope_at(smoothed, 1.1 * rest, beta)


@LAW
@given(gain=st.floats(-5000, 5000))
def test_dpo_never_rests(gain: float) -> None:
    assert slope_at(losses.dpo, gain) == pytest.approx(-BETA / (1 + math.exp(BETA * gain)), rel=1e-12)
    assert slope_at(losses.dpo, gain) < 0


def test_hinge_rests_beyond_its_margin() -> None:
    assert slope_at(losses.hinge, 0.99 / BETA) == -BETA
    assert slope_at(losses.hinge, 1.01 / BETA) == 0


def test_sppo_rests_at_half_an_inverse_beta_on_either_side() -> None:
    up = torch.tensor([1 / (2 * BETA)], dtype=torch.float64, requires_grad=True)
    down = (-up).detach().requires_grad_()
    loss = losses.sppo_hard(up, down, torch.zeros(1), torch.zeros(1), BETA)
    assert loss.item() == 0
    assert not any(slope.any() for slope in torch.autograd.grad(loss.sum(), (up, down)))


@LAW
@given(rewards=st.lists(st.floats(-3, 3), min_size=2, max_size=2), beta=st.floats(0.05, 2.0))
def test_true_probabilities_make_the_optimum_of_the_kl_objective(rewards: list[float], beta: float) -> None:
    """At log π = log π_ref + r/β a soft label of σ(r_w − r_l) leaves no gradient; a smoothed hard one does."""
    first, second = rewards
    target = 1 / (1 + math.exp(second - first))
    soft = slope_at(partial(losses.soft_dpo, target=target), (first - second) / beta, beta)
    assert soft == pytest.approx(0, abs=1e-12)


def test_apo_moves_each_side_as_it_says() -> None:
    for formula, sign in ((losses.apo_zero, -1), (losses.apo_down, 1)):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        y = torch.full((1,), -30.0, dtype=torch.float64, requires_grad=True)  # already far apart
        up, down = torch.autograd.grad(formula(x, y, x.detach(), x.detach(), BETA).sum(), (x, y))
        assert up.sign() == sign
        assert down > 0


# --- what leaves a loss unmoved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_THE_GAIN)
def test_what_both_answers_share_cancels(name: str) -> None:
    """A constant of the prompt, such as log Z, changes neither value nor gradient."""
    c, r, qc, qr = four()
    formula = OF_THE_GAIN[name]
    torch.testing.assert_close(
        formula(c + 3, r + 3, qc - 2, qr - 2, BETA), formula(c, r, qc, qr, BETA), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", sorted(set(PAIRED) - set(OF_THE_GAIN) - {"dpop"}))
def test_the_others_see_absolute_gains(name: str) -> None:
    c, r, qc, qr = four()
    formula = PAIRED[name]
    assert not torch.allclose(formula(c + 3, r + 3, qc, qr, BETA), formula(c, r, qc, qr, BETA), rtol=1e-3)


@pytest.mark.parametrize("name", {**PAIRED, **FREE})
def test_pairs_do_not_know_each_other(name: str) -> None:
    """So that any split into micro-batches adds up to the same."""
    formula, x = EVERY[name], four()
    parts = [formula(*(y[i : i + 1] for y in x), BETA) for i in range(6)]
    torch.testing.assert_close(formula(*x, BETA), torch.cat(parts))


def test_optimal_transport_knows_ranks_only() -> None:
    c, r, qc, qr = four()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    paired, unpaired = losses.aot(c, r, qc, qr, BETA), losses.aot_unpaired(c, r, qc, qr, BETA)
    torch.testing.assert_close(losses.aot(c, r, qc[order], qr[order], BETA), paired)
    torch.testing.assert_close(losses.aot_unpaired(c[order], r, qc[order], qr, BETA), unpaired)
    one = [x[:1] for x in (c, r, qc, qr)]
    for formula in (losses.aot, losses.aot_unpaired):
        torch.testing.assert_close(formula(*one, BETA, 0.1), losses.dpo(*one, BETA, 0.1))


# --- relatives -------------------------------------------------------------------------------------------------------


def test_relatives_agree() -> None:
    x = four()
    plain, zero = losses.dpo(*x, BETA), torch.zeros(6, dtype=torch.float64)
    same = [
        (losses.soft_dpo(*x, BETA, 1.0), plain),
        (losses.soft_dpo(x[1], x[0], x[3], x[2], BETA, 0.0), plain),
        (losses.robust_dpo(*x, BETA), plain),
        (losses.f_dpo(*x, BETA, "reverse_kl"), plain),
        (losses.f_dpo(*x, BETA, "alpha", 1e-7), plain),
        (losses.dpop(*x, BETA, penalty=0.0), plain),
        (losses.dpop(x[2] + 1, x[1], x[2], x[3], BETA), losses.dpo(x[2] + 1, x[1], x[2], x[3], BETA)),
        (losses.cpo(*x[:2], BETA), losses.dpo(*x[:2], zero, zero, BETA)),
        (losses.simpo(*x[:2], BETA, 0.0), losses.cpo(*x[:2], BETA)),
        (losses.bradley_terry(losses.implicit_reward(x[0], x[2], BETA), BETA * (x[1] - x[3])), plain),
    ]
    for found, expected in same:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@LAW
@given(wrong=st.floats(0.0, 0.45))
def test_robust_dpo_is_dpo_in_the_mean_over_flipped_labels(wrong: float) -> None:
    c, r, qc, qr = four()
    robust = partial(losses.robust_dpo, beta=BETA, label_smoothing=wrong)
    mean = (1 - wrong) * robust(c, r, qc, qr) + wrong * robust(r, c, qr, qc)
    torch.testing.assert_close(mean, losses.dpo(c, r, qc, qr, BETA))


# --- numbers far out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sides", [(0.0, -800.0), (-800.0, 0.0), (-800.0, -800.0), (-8000.0, -0.5)])
def test_nothing_overflows(name: str, dtype: torch.dtype, sides: tuple[float, float]) -> None:
    leaves = [torch.full((2,), x, dtype=dtype, requires_grad=True) for x in sides]
    loss = EVERY[name](*leaves, torch.zeros(2, dtype=dtype), torch.full((2,), -3.0, dtype=dtype), BETA)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(loss).all()
    for slope in torch.autograd.grad(loss.sum(), leaves):
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_far_out_is_right_too(dtype: torch.dtype) -> None:
    x, zero = torch.tensor([-800.0, 800.0], dtype=dtype, requires_grad=True), torch.zeros(2, dtype=dtype)
    loss = losses.dpo(x, zero, zero, zero, 1.0)
    assert loss.tolist() == [800.0, 0.0]
    assert torch.autograd.grad(loss.sum(), x)[0].tolist() == [-1.0, 0.0]
    assert losses.discopop(x, zero, zero, zero, 1.0).tolist() == [800.0, 0.0]
    assert losses.exo_pair(x, zero, zero, zero, 1.0, 0.25).tolist() == pytest.approx([math.log(4), math.log(4 / 3)])
    kto = losses.kto(x, zero, torch.tensor([True, False]), 0.0, 1.0)
    assert kto.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", {**PAIRED, **FREE})
def test_half_precision_is_widened_first(name: str) -> None:
    half = [x.bfloat16() for x in four()]
    torch.testing.assert_close(EVERY[name](*half, BETA), EVERY[name](*(x.float() for x in half), BETA), rtol=0, atol=0)


@pytest.mark.parametrize("certain", [0.0, -1e-20, -1e-12, -1e-7, -60.0, -800.0])
def test_odds_of_a_sure_or_hopeless_answer(certain: float) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.full((2,), certain, dtype=dtype, requires_grad=True)
        middling = torch.full((2,), -1.0, dtype=dtype)
        for loss in (losses.orpo(x, middling), losses.orpo(middling, x)):
            assert torch.isfinite(loss).all()
            assert torch.isfinite(torch.autograd.grad(loss.sum(), x)[0]).all()


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_derivatives(name: str) -> None:
    leaves = [(random(4, seed=seed) - 3).requires_grad_() for seed in range(1, 5)]
    assert torch.autograd.gradcheck(lambda *x: EVERY[name](*x, 0.5), leaves)


def test_gradients_of_the_rest_are_derivatives() -> None:
    x, y = ((-random(4, seed=seed).abs() - 0.1).requires_grad_() for seed in (1, 2))
    good = torch.tensor([True, False, True, False])
    checks: list[tuple[Formula, tuple[Tensor, ...]]] = [
        (losses.log1mexp, (x,)),
        (losses.orpo, (x, y)),
        (lambda a, b: losses.kto(a, b, good, 0.3, 0.5, 1.0, 1.3), (x, y)),
        (lambda a, b: losses.bco(a, b, good, 0.5, 0.3), (x, y)),
    ]
    for formula, leaves in checks:
        assert torch.autograd.gradcheck(formula, leaves)


# --- constants get no gradient ---------------------------------------------------------------------------------------


def test_the_point_of_reference_gets_no_gradient() -> None:
    x, good = four(), torch.tensor([True, False] * 3)
    leaf = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for loss in (
        losses.kto(x[0].clone().requires_grad_(), x[2], good, leaf, BETA),
        losses.bco(x[0].clone().requires_grad_(), x[2], good, BETA, leaf),
        losses.bco_pair(x[0].clone().requires_grad_(), *x[1:], BETA, leaf),
    ):
        assert torch.autograd.grad(loss.sum(), leaf, allow_unused=True) == (None,)


@LAW
@given(gain=st.floats(-50, 50), kl=st.floats(0, 20))
def test_kto_pulls_most_at_its_point_of_reference(gain: float, kl: float) -> None:
    def pull(x: float, good: bool) -> float:
        leaf = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        loss = losses.kto(leaf, torch.zeros(1), torch.tensor([good]), kl, BETA)
        return torch.autograd.grad(loss.sum(), leaf)[0].item()

    for good, sign in ((True, -1), (False, 1)):
        assert sign * pull(gain, good) > 0
        assert sign * pull(gain, good) <= sign * pull(kl, good) + 1e-15
        assert pull(kl, good) == pytest.approx(sign * BETA / 4)


@pytest.mark.parametrize("smoothing", [0.0, 1.0, -0.1])
def test_exo_has_no_hard_labels(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.exo_pair(*four(), BETA, smoothing)


@pytest.mark.parametrize(("name", "alpha"), [("jensen", 0.5), ("alpha", -0.1), ("alpha", 1.5)])
def test_unknown_divergences(name: str, alpha: float) -> None:
    with pytest.raises(ValueError, match="divergence"):
        losses.f_dpo(*four(), BETA, name, alpha)  # type: ignore[arg-type]

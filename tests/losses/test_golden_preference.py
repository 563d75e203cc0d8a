"""The golden groups of the preference methods, to 1e-9 in float64 and 1e-5 in float32; masked cells hold garbage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from palate import losses
from tests.losses.golden import DTYPES, close, gradient, group, part_of, tensor

SIDES = {"chosen": "mask_chosen", "rejected": "mask_rejected"}


class Logp(NamedTuple):
    """Log-probabilities of the three pairs, in the order of the formulas' arguments."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


def inputs(case: dict[str, Any], dtype: torch.dtype, average: bool = False) -> Logp:
    found = [
        losses.answer_logp(tensor(case[f"{who}_{side}_tok"], dtype), torch.tensor(case[mask]), average)
        for who in ("policy", "ref")
        for side, mask in SIDES.items()
    ]
    return Logp(*(x.detach().requires_grad_() for x in found))


@DTYPES
def test_log_probabilities_of_answers(dtype: torch.dtype) -> None:
    case = group("preference_losses")
    expected = case["expected"]
    summed, mean = inputs(case, dtype), inputs(case, dtype, average=True)
    for who, first in (("policy", 0), ("ref", 2)):
        assert close(summed[first], expected[f"{who}_chosen_logp"])
        assert close(summed[first + 1], expected[f"{who}_rejected_logp"])
    for found, name in ((summed, "h_sum"), (mean, "h_avg")):
        assert close(found.chosen - found.rejected - (found.ref_chosen - found.ref_rejected), expected[name])


@DTYPES
def test_dpo(dtype: torch.dtype) -> None:
    case = group("preference_losses")
    beta, eps, expected = case["beta"], case["eps"], case["expected"]
    x = inputs(case, dtype)
    loss = losses.dpo(*x, beta)
    assert close(loss, expected["dpo_per"])
    assert close(loss.mean(), expected["dpo"])
    assert close(gradient(loss.mean(), x.chosen)[0], expected["dpo_grad_wrt_policy_chosen_logp"])
    assert close(losses.dpo(*x, beta, eps).mean(), expected["cdpo_eps0p1"])
    assert close(losses.soft_dpo(*x, beta, 1 - eps).mean(), expected["cdpo_eps0p1"])
    assert close(losses.robust_dpo(*x, beta, eps).mean(), expected["robust_eps0p1"])
    assert close(losses.cpo(x.chosen, x.rejected, beta).mean(), expected["dpo_reference_free"])
    assert close(losses.dpo(*inputs(case, dtype, average=True), beta).mean(), expected["dpo_length_normalised"])
    up = losses.implicit_reward(x.chosen, x.ref_chosen, beta)
    down = losses.implicit_reward(x.rejected, x.ref_rejected, beta)
    assert close(up, expected["dpo_reward_chosen"])
    assert close(down, expected["dpo_reward_rejected"])
    assert close((up - down).mean(), expected["dpo_margin"])
    assert (up > down).double().mean().item() == pytest.approx(expected["dpo_accuracy"])


@DTYPES
def test_a_dropped_mask_shows(dtype: torch.dtype) -> None:
    case = group("preference_losses")
    everything = {**case, **{mask: torch.ones(3, 6).tolist() for mask in SIDES.values()}}
    wrong = losses.dpo(*inputs(everything, dtype), case["beta"]).mean()
    assert close(wrong, case["must_not"]["dpo_without_mask"])
    assert abs(losses.dpo(*inputs(case, dtype), case["beta"]).mean() - wrong) > 1e-3


@DTYPES
def test_the_other_losses_of_pairs(dtype: torch.dtype) -> None:
    case = group("preference_losses")
    beta, eps, expected = case["beta"], case["eps"], case["expected"]
    x, mean = inputs(case, dtype), inputs(case, dtype, average=True)
    per_pair = {
        "hinge_per": losses.hinge(*x, beta),
        "ipo_avg_per": losses.ipo(*mean, beta),
        "simpo_per": losses.simpo(mean.chosen, mean.rejected, 2.0, 1.0),
    }
    means = {
        "hinge": losses.hinge(*x, beta),
        "ipo_sum": losses.ipo(*x, beta),
        "ipo_avg": losses.ipo(*mean, beta),
        "simpo_beta2_gamma1": losses.simpo(mean.chosen, mean.rejected, 2.0, 1.0),
        "simpo_beta10_ratio0p3": losses.simpo(mean.chosen, mean.rejected, 10.0, 10.0 * 0.3),
        "slic_delta1_lambda0p1": losses.slic(x.chosen, x.rejected, delta=1.0, weight=0.1),
        "dpop_lambda5": losses.dpop(*x, beta, penalty=5.0),
        "bco_delta0": losses.bco_pair(*x, beta),
        "apo_zero": losses.apo_zero(*x, beta),
        "apo_down": losses.apo_down(*x, beta),
        "nca": losses.nca_pair(*x, beta),
        "exo_eps0p1": losses.exo_pair(*x, beta, eps),
    }
    for name, loss in per_pair.items():
        assert close(loss, expected[name]), name
    for name, loss in means.items():
        assert loss.shape == (3,), name  # one number per pair, never pairs × tokens
        assert close(loss.mean(), expected[name]), name


@DTYPES
def test_dpo_with_the_cross_entropy_of_the_chosen_answer(dtype: torch.dtype) -> None:
    case = group("preference_losses")
    mask = torch.tensor(case["mask_chosen"])
    nll = losses.cross_entropy(tensor(case["policy_chosen_tok"], dtype), mask).sum() / mask.sum()
    total = losses.dpo(*inputs(case, dtype), case["beta"]).mean() + nll
    assert close(total, case["expected"]["rpo_dpo_plus_1x_nll_tokenmean"])


def at_reference(formula: Callable[..., Tensor], *more: Any, dtype: torch.dtype = torch.float64) -> list[float]:
    chosen, rejected = torch.tensor([-3.7, -800.0], dtype=dtype), torch.tensor([-41.3, -0.1], dtype=dtype)
    return formula(chosen, rejected, chosen, rejected, *more).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_where_policy_and_reference_agree(dtype: torch.dtype) -> None:
    """Exactly so, however unlikely the answers are and whatever the number type."""
    expected = group("preference_losses_step0")["expected"]
    beta = 0.1
    found = {
        "dpo": at_reference(losses.dpo, beta, dtype=dtype),
        "cdpo": at_reference(losses.dpo, beta, 0.1, dtype=dtype),
        "robust": at_reference(losses.robust_dpo, beta, 0.1, dtype=dtype),
        "hinge": at_reference(losses.hinge, beta, dtype=dtype),
        "ipo": at_reference(losses.ipo, beta, dtype=dtype),
        "rewards": losses.implicit_reward(*[torch.tensor([-3.7, -800.0], dtype=dtype)] * 2, beta).tolist(),
    }
    for name, values in found.items():
        assert values == pytest.approx([expected[name]] * 2, rel=1e-6 if dtype != torch.float64 else 1e-12), name
    logp, good = torch.tensor([-3.7, -800.0], dtype=dtype), torch.tensor([True, False])
    z = losses.kto_kl(logp, logp)
    assert z.item() == expected["kto_z0"]
    assert losses.kto(logp, logp, good, z, beta).tolist() == [expected["kto_loss"]] * 2


LOG2 = math.log(2)
AT_REFERENCE: list[tuple[Callable[..., Tensor], tuple[Any, ...], float]] = [
    (losses.soft_dpo, (0.1, 0.3), LOG2),
    (losses.ipo, (0.5,), 1.0),
    (losses.exo_pair, (0.1, 0.2), -LOG2 - 0.5 * math.log(0.8 * 0.2)),
    (losses.nca_pair, (0.1,), 2 * LOG2),
    (losses.bco_pair, (0.1,), 2 * LOG2),
    (losses.sppo_hard, (0.1,), 50.0),
    (losses.apo_zero, (0.1,), 1.0),
    (losses.apo_down, (0.1,), 1.0),
    (losses.aot, (0.1,), LOG2),
    (losses.aot_unpaired, (0.1,), LOG2),
    (losses.discopop, (0.1,), 0.5 * LOG2 + 0.5),
    (losses.dpop, (0.1,), LOG2),
    (losses.f_dpo, (0.1, "reverse_kl"), LOG2),
    (losses.f_dpo, (0.1, "forward_kl"), LOG2),
    (losses.f_dpo, (0.1, "js"), LOG2),
    (losses.f_dpo, (0.1, "alpha", 0.3), LOG2),
]


@pytest.mark.parametrize(("formula", "more", "value"), AT_REFERENCE)
def test_the_other_losses_where_both_agree(formula: Callable[..., Tensor], more: tuple[Any, ...], value: float) -> None:
    assert at_reference(formula, *more) == pytest.approx([value] * 2, rel=1e-12)


@DTYPES
def test_odds_ratio(dtype: torch.dtype) -> None:
    case, x = group("orpo"), group("preference_losses")
    expected = case["expected"]
    mean = inputs(x, dtype, average=True)
    assert close(mean.chosen, expected["avg_chosen"])
    assert close(mean.rejected, expected["avg_rejected"])
    ratio = losses.log_odds(mean.chosen) - losses.log_odds(mean.rejected)
    assert close(ratio, expected["log_odds_ratio"])
    assert (ratio > 0).double().mean().item() == pytest.approx(expected["log_odds_accuracy"])
    loss = losses.orpo(mean.chosen, mean.rejected)
    assert close(loss, expected["l_or_per"])
    assert close(loss.mean(), expected["l_or"])
    assert abs(loss.mean().item() - case["must_not"]["coati_one_sigmoid_for_batch_of_token_odds"]) > 1e-3
    mask = torch.tensor(x["mask_chosen"])
    nll = losses.cross_entropy(tensor(x["policy_chosen_tok"], dtype), mask)
    for mean_nll, name in ((nll.sum() / mask.sum(), "token"), ((nll.sum(-1) / mask.sum(-1)).mean(), "sequence")):
        assert close(mean_nll, expected[f"nll_{name}_mean"])
        assert close(mean_nll + case["lambda_"] * loss.mean(), expected[f"loss_with_{name}_mean_nll"])


@DTYPES
def test_log1mexp_at_both_ends(dtype: torch.dtype) -> None:
    case = group("orpo_log1mexp")
    a = tensor(case["a"], dtype)
    found, odds = losses.log1mexp(a), losses.log_odds(a)
    tiny = 0.0 if dtype == torch.float64 else 1e-30
    golden = torch.tensor(case["expected"]["log1mexp"], dtype=torch.float64)
    room = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), golden, rtol=room, atol=tiny)
    assert close(odds, case["expected"]["log_odds"])
    for x in (found, odds):
        assert torch.isfinite(x).all()
        assert torch.isfinite(gradient(x.sum(), a)[0]).all()
    naive = torch.tensor([float(x) for x in case["must_not"]["naive_fp32"]], dtype=torch.float64)
    missed = (found.double() - naive).abs() > 1e-6 * found.double().abs()
    assert missed.nonzero()[:, 0].tolist() == [0, 1, 2, 6, 7]


@DTYPES
def test_corrected_spans(dtype: torch.dtype) -> None:
    case = group("ddpo_rlhfv")
    expected = case["expected"]

    def loss(gamma: float, beta: float, normalise: bool = True, kind: str = "changed") -> tuple[Tensor, Tensor]:
        scores: list[Tensor] = []
        for who in ("policy", "ref"):
            for side in SIDES:
                logp = tensor([case[f"{who}_{side}_tok"]], dtype)
                corrected = torch.zeros(logp.shape, dtype=torch.bool)
                corrected[0, expected[f"{kind}_{side}"]] = True
                scores.append(losses.ddpo_score(logp, torch.ones_like(corrected), corrected, gamma, normalise))
        gain = scores[0] - scores[1] - (scores[2] - scores[3])
        return gain[0], losses.dpo(*scores, beta)[0]

    for found, name in (
        (loss(5.0, 0.5), "paper_gamma5_beta0p5"),
        (loss(1.0, 0.5), "gamma1_equals_length_normalised_dpo"),
    ):
        assert close(found[0], expected[name]["h"]), name
        assert close(found[1], expected[name]["loss"]), name
    released = loss(1.1, 0.1, normalise=False, kind="released_rule_changed")
    assert close(released[0], expected["released_gamma1p1_beta0p1_sum"]["h"])
    assert close(released[1], expected["released_gamma1p1_beta0p1_sum"]["loss"])
    same = losses.ddpo_score(tensor([case["policy_chosen_tok"]], dtype), torch.ones(1, 12), torch.zeros(1, 12), 5.0)
    assert close(losses.dpo(same, same, same, same, 0.5)[0], expected["identical_pair_must_give"])


@DTYPES
def test_soft_labels_of_a_constitution(dtype: torch.dtype) -> None:
    expected = part_of("constitutional_ai")["expected"]
    target = torch.tensor(expected["p_A"], dtype=dtype).mean()
    loss = losses.soft_bradley_terry(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype), target)
    assert close(loss, expected["pm_loss_rA1_rB0"])

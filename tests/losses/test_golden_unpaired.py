"""The golden groups of single labelled answers and of offline Q-learning, to 1e-9 in float64 and 1e-5 in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palate import credit, losses
from tests.losses.golden import DTYPES, close, gradient, group, tensor

# --- labelled answers ------------------------------------------------------------------------------------------------


@DTYPES
def test_kto(dtype: torch.dtype) -> None:
    case = group("kto")
    beta, expected = case["beta"], case["expected"]
    logp, ref = tensor(case["policy_logp"], dtype), tensor(case["ref_logp"], dtype)
    off, ref_off = tensor(case["policy_logp_mismatched"], dtype), tensor(case["ref_logp_mismatched"], dtype)
    good = torch.tensor(case["label_desirable"])
    z = losses.kto_kl(off, ref_off)
    assert close(z, expected["z0"])
    assert not z.requires_grad  # must_not: gradient_flows_through_z0
    loss = losses.kto(logp, ref, good, z, beta)
    assert close(loss, expected["per"])
    assert close(loss.mean(), expected["loss"])
    assert close(gradient(loss.mean(), logp)[0], expected["grad_policy_logp"])
    kinds = loss[good.bool()].mean() + loss[~good.bool()].mean()
    assert abs(loss.mean() - case["must_not"]["mean_of_desirable_plus_mean_of_undesirable"]) > 1e-3
    assert close(kinds, case["must_not"]["mean_of_desirable_plus_mean_of_undesirable"])
    weighted = losses.kto(logp, ref, good, z, beta, weight_undesirable=1.33)
    assert close(weighted.mean(), expected["lambda_U_1p33"]["loss"])


@DTYPES
def test_kto_at_the_edges(dtype: torch.dtype) -> None:
    case = group("kto")
    beta, expected = case["beta"], case["expected"]
    logp, ref = tensor(case["policy_logp"], dtype), tensor(case["ref_logp"], dtype)
    good = torch.tensor(case["label_desirable"])
    negative = expected["z0_negative_is_clamped"]
    z = losses.kto_kl(torch.tensor([-2.0], dtype=dtype), torch.tensor([-1.0], dtype=dtype))
    assert z.item() == negative["z0"]
    assert close(losses.kto(logp, ref, good, z, beta), negative["per"])
    assert close(losses.kto(logp, ref, good, z, beta).mean(), negative["loss"])
    alike, kind = expected["all_desirable_batch"], good.bool()  # the desirable rows as a batch of their own
    off, ref_off = (torch.tensor(case[f"{who}_logp_mismatched"], dtype=dtype)[kind] for who in ("policy", "ref"))
    z = losses.kto_kl(off, ref_off)
    assert close(z, alike["z0"])
    assert close(losses.kto(logp[kind], ref[kind], good[kind], z, beta).mean(), alike["loss"])


# --- offline Q-learning ----------------------------------------------------------------------------------------------


def offline(
    case: dict[str, Any], dtype: torch.dtype, heads: int = 2, **changes: float
) -> tuple[dict[str, Any], Tensor]:
    """The terms of the golden case with leaves `v` and `q1`, and the mask of its actions."""
    alive = torch.tensor(case["dones_not_terminal"]).bool()
    actions, mask = torch.tensor(case["actions"]), alive[:, :-1]
    v, q = tensor(case["v"], dtype), [tensor(case[f"q{k + 1}"], dtype) for k in range(heads)]
    settings = {"tau": case["tau"], "gamma": case["gamma"], "cql_weight": case["cql_scale"], "beta": 0.0, **changes}
    found: dict[str, Any] = losses.ilql(
        q,
        [tensor(case[f"target_q{k + 1}"], dtype) for k in range(heads)],
        v[:, :-1],
        losses.next_value(v, alive)[:, :-1],
        torch.tensor(case["rewards"], dtype=dtype),
        losses.row_logp(tensor(case["policy_logits"], dtype), actions),
        mask,
        awac_weight=case["awac_scale"],
        action_BT=actions,
        **settings,
    )
    return {**found, "leaves": (v, q[0])}, mask


@DTYPES
def test_ilql(dtype: torch.dtype) -> None:
    case = group("ilql")
    for name, heads, changes in (
        ("beta0", 2, {}),
        ("beta1", 2, {"beta": 1.0}),
        ("tau0p5_is_half_mse", 2, {"tau": 0.5}),
        ("single_q", 1, {}),
    ):
        found, mask = offline(case, dtype, heads, **changes)
        expected = case["expected"][name]
        assert mask.sum() == expected["n"]
        for term in ("q", "v", "cql", "awac", "total"):
            mean = found[term].sum() / mask.sum()
            assert close(mean, expected["total" if term == "total" else f"loss_{term}"]), (name, term)
            assert not found[term][~mask].any()


@DTYPES
def test_gradients_of_ilql(dtype: torch.dtype) -> None:
    case = group("ilql")
    found, mask = offline(case, dtype)
    v, q1 = gradient(found["total"].sum() / mask.sum(), *found["leaves"])
    assert close(v, case["expected"]["grad_v"])
    assert close(q1, case["expected"]["grad_q1"])
    wrong = found["v"].sum() / mask.numel()
    assert close(wrong, case["must_not"]["reduction_over_padded_actions_n6"]["loss_v"])
    assert abs(found["v"].sum() / mask.sum() - wrong) > 1e-3


@DTYPES
def test_decoding_with_q(dtype: torch.dtype) -> None:
    case = group("ilql")
    expected = case["expected"]
    heads = torch.stack([tensor(case[f"target_q{k}"], dtype) for k in (1, 2)])
    scores = losses.ilql_logits(tensor(case["policy_logits"], dtype), heads, tensor(case["v"], dtype)[:, :-1], 1.0)[
        0, 0
    ]
    assert close(scores, expected["decode_scores_row0_t0_beta1"])
    assert close(scores.softmax(-1), expected["decode_probs_full"])
    best = scores.masked_fill(scores < scores.topk(2).values[-1], -torch.inf)
    assert close(best.softmax(-1), expected["decode_probs_top2"])


def test_standardised_returns() -> None:
    case = group("ilql")["expected"]["returns_standardised_example"]
    returns = torch.tensor(case["returns"], dtype=torch.float64)
    gain, bias = credit.gain_and_bias(returns, 0.0, 1.0, sample=True)
    assert close(gain * returns + bias, case["z"])

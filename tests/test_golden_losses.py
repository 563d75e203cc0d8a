"""The groups of tests/golden/losses.json that concern SFT, reward models and PPO, to 1e-9 in float64, 1e-5 in float32.

`must_not` values are what named systems compute by mistake; they must be missed. The groups of the preference methods
and of offline learning are in tests/losses. `ELSEWHERE` names the groups that are tested beside another part of the
library, or whose formulas it does not have yet; a group that is neither tested nor listed there fails the suite.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate import credit, losses
from tests.losses.golden import DTYPES, GOLDEN, close, gradient, group, tensor

ELSEWHERE = {
    "elo_bradley_terry": "tests/judges/test_ratings.py",
    "constitutional_ai": "later: feedback from AI; its loss is in tests/losses",
    "rft": "tests/algorithms/test_best_of_n.py",
    "llava_rlhf_reward": "later: vision rewards",
    "mmhal": "later: vision evaluation",
    "object_halbench": "later: vision evaluation",
    "rouge": "tests/evaluation/test_text.py",
    "quant4_and_lora": "later: quantised serving",
}


def test_every_group_is_tested_or_listed() -> None:
    tested: set[str] = set()
    for path in Path(__file__).parent.rglob("test_golden_*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        called = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "group"]
        tested |= {ast.literal_eval(call.args[0]) for call in called if isinstance(call.args[0], ast.Constant)}
    assert not (tested & set(GOLDEN)) & set(ELSEWHERE)
    assert (tested | set(ELSEWHERE)) >= set(GOLDEN) - {"_meta"}


# --- reward models ---------------------------------------------------------------------------------------------------


@DTYPES
def test_pairwise(dtype: torch.dtype) -> None:
    case = group("rm_pairwise")
    expected = case["expected"]
    margin, target = tensor(case["margin"], dtype), tensor(case["soft_target"], dtype)
    chosen, rejected = tensor(case["chosen"], dtype), tensor(case["rejected"], dtype)
    plain = losses.bradley_terry(chosen, rejected)
    assert close(plain, expected["logsig_per_pair"])
    assert close(plain.mean(), expected["logsig"])
    assert close(plain.mean(), expected["logexp"])  # ColossalChat's other loss is the same function
    up, down = gradient(plain.mean(), chosen, rejected)
    assert close(up, expected["grad_chosen"])
    assert close(down, expected["grad_rejected"])
    asked = losses.bradley_terry(chosen, rejected, margin)
    assert close(asked, expected["margin_per_pair"])
    assert close(asked.mean(), expected["margin"])
    smoothed = losses.soft_bradley_terry(chosen, rejected, 1 - case["label_smoothing"])
    assert close(smoothed.mean(), expected["smoothed"])
    assert close(losses.soft_bradley_terry(chosen, rejected, target).mean(), expected["soft_label"])
    centred = losses.centring(torch.stack([chosen, rejected], -1))
    assert close(0.01 * centred.mean(), expected["centering_reg_0p01"])
    gap = (chosen - rejected).detach()
    assert (gap > 0).double().mean() == expected["accuracy_strict"]
    assert (gap.sign() + 1).double().mean() / 2 == expected["accuracy_ties_half"]
    assert close(gap.mean(), expected["mean_margin"])
    assert credit.gain_and_bias(chosen, std=None) == pytest.approx(
        (1.0, expected["instructgpt_bias_if_chosen_are_demos"])
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pairwise_far_out(dtype: torch.dtype) -> None:
    case = group("rm_pairwise_extreme")
    gap = tensor(case["d"], dtype)
    loss = losses.bradley_terry(gap, torch.zeros_like(gap))
    (slope,) = gradient(loss.sum(), gap)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(slope).all()
    room = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 1e-2)
    golden, slopes = (torch.tensor(case["expected"][name], dtype=torch.float64) for name in ("logsig", "grad_wrt_d"))
    tiny = 0.0 if dtype == torch.float64 else 1e-30  # float32 ends at 1e-45: e^−104 and less are 0 there
    torch.testing.assert_close(loss.double(), golden, rtol=room, atol=tiny)
    torch.testing.assert_close(slope.double(), slopes, rtol=room, atol=max(tiny, 0.0 if room < 1e-3 else 1e-7))
    for wrong in case["must_not"].values():
        assert not torch.equal(loss.double(), torch.tensor([float(x) for x in wrong], dtype=torch.float64))


@DTYPES
def test_rankings(dtype: torch.dtype) -> None:
    case = group("rm_kwise_instructgpt")
    expected, rows = case["expected"], case["rewards_best_to_worst"]
    scores = torch.full((3, 9), math.nan, dtype=dtype)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, values in enumerate(rows.values()):
        scores[row, : len(values)], mask[row, : len(values)] = torch.tensor(values, dtype=dtype), True
    scores.requires_grad_()
    ranks = torch.arange(9).expand(3, 9)
    loss = losses.ranking(scores, ranks, mask)
    assert close(loss, [expected[name] for name in rows])
    assert close(loss.mean(), expected["batch_mean_over_prompts"])
    assert not close(loss.mean(), case["must_not"]["flat_mean_over_all_pairs"])
    assert not close(loss[0], case["must_not"]["sum_over_pairs_K4"])
    assert torch.isfinite(gradient(loss.sum(), scores)[0]).all()
    tied = losses.ranking(tensor([rows["K5"]], dtype), torch.tensor([[0, 1, 1, 2, 3]]))[0]
    assert close(tied, expected["K5_with_tie_between_rank2_and_rank3_dropped_norm_by_remaining"])
    assert not close(tied, expected["K5_tie_dropped_norm_by_CK2"])
    assert (mask.sum(-1) * (mask.sum(-1) - 1) // 2).tolist() == [case["n_pairs"][name] for name in rows]
    for i, j, value in expected["K4_pairs"]:
        assert close(losses.bradley_terry(scores[0, i], scores[0, j]), value)


@DTYPES
def test_rewards_are_read_at_the_last_real_token(dtype: torch.dtype) -> None:
    case = group("trlx_summarize_rm_loss")
    scores: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        last = credit.last_true_index(torch.tensor(case[f"{side}_ids"]) != case["pad_id"])
        scores[side] = tensor(case[f"{side}_token_rewards"], dtype).gather(1, last[:, None])[:, 0]
        assert close(scores[side], case["expected"][f"{side}_scores"])
    loss = losses.bradley_terry(scores["chosen"], scores["rejected"])
    assert close(loss, case["expected"]["ours_per_pair"])
    assert close(loss.mean(), case["expected"]["ours_last_token"])
    assert not close(loss.mean(), case["must_not"]["trlx_repo_token_window_loss"])
    assert not close(loss.mean(), case["must_not"]["seed_tutorial_loss_divided_inside_loop"])
    assert not close(scores["chosen"], case["must_not"]["trlx_score_at_max_end_index"])


@DTYPES
def test_last_index_under_either_padding(dtype: torch.dtype) -> None:
    case = group("rm_pooling")
    values, mask = tensor(case["token_values"], dtype), torch.tensor(case["attention_mask"])
    last = credit.last_true_index(mask)
    assert last.tolist() == case["expected"]["last_index"]
    pooled = values.gather(1, last[:, None])[:, 0]
    assert close(pooled, case["expected"]["last"])
    assert close(losses.keep(values, mask).sum(-1) / mask.sum(-1), case["expected"]["masked_mean"])
    assert not any(close(pooled, wrong) for wrong in case["must_not"].values())


# --- supervised fine-tuning ------------------------------------------------------------------------------------------


@DTYPES
def test_cross_entropy_of_answers(dtype: torch.dtype) -> None:
    case = group("sft_ptx_cross_entropy")
    expected, wrong = case["expected"], case["must_not"]
    logits, tokens = tensor(case["logits"], dtype), torch.tensor(case["input_ids"])
    mask = torch.tensor(case["loss_mask_on_target_tokens"]).bool()
    logp = losses.token_logp(logits, tokens)
    loss = losses.cross_entropy(logp, mask)
    token_mean = loss.sum() / mask.sum()
    assert mask.sum() == expected["n_tokens"]
    assert close(loss.sum(), expected["sum"])
    assert close(token_mean, expected["token_mean"])
    sequence_mean = (loss.sum(-1) / mask.sum(-1)).mean()
    assert close(sequence_mean, expected["sequence_mean"])
    parts = torch.stack([row.sum() / mask.sum() for row in loss])  # one row at a time, one division
    assert close(parts.sum(), expected["grad_accum_micro1_each_row_correct"])
    assert not any(close(token_mean, value) for value in wrong.values())
    everything = torch.ones_like(mask)
    everything[:, 0] = False
    unmasked = losses.cross_entropy(logp, everything).sum() / everything.sum()
    assert close(unmasked, wrong["no_mask_trains_on_prompt_and_pad"])  # so the mask is what makes the difference


@DTYPES
def test_two_ways_to_mix_pretraining_in(dtype: torch.dtype) -> None:
    expected = group("sft_ptx_cross_entropy")["expected"]
    pretraining = torch.tensor(expected["token_mean"], dtype=dtype)
    added, convex = expected["ppo_ptx_instructgpt_total"], expected["ppo_ptx_coati_convex"]
    objective = torch.tensor(added["ppo_loss"], dtype=dtype)
    assert close(losses.added_mix(objective, pretraining, added["gamma"]), added["value"])
    assert close(losses.convex_mix(objective, pretraining, convex["ptx_coef"]), convex["value"])


# --- PPO -------------------------------------------------------------------------------------------------------------


def ppo_inputs(case: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs with nan in every masked cell."""
    mask = torch.tensor(case["mask"]).bool()
    names = ("old_logp", "new_logp", "ref_logp", "old_values", "new_values")
    raw = {name: torch.tensor(case[name], dtype=dtype).masked_fill(~mask, math.nan) for name in names}
    return raw, mask


@DTYPES
def test_ppo_rewards_and_advantages(dtype: torch.dtype) -> None:
    case = group("ppo")
    expected, wrong = case["expected"], case["must_not"]
    x, mask = ppo_inputs(case, dtype)
    score = torch.tensor(case["score"], dtype=dtype)
    rewards = credit.shape_reward(score, x["old_logp"], x["ref_logp"], mask, case["kl_coef"])
    assert close(rewards, expected["rewards"])
    assert not close(rewards, wrong["coati_v2_score_added_to_every_token"])
    advantages = credit.gae(rewards, x["old_values"], mask, case["gamma"], case["lam"])
    assert close(advantages, expected["advantages"])
    assert close(advantages + losses.keep(x["old_values"], mask), expected["returns"])
    whitened = credit.whiten(advantages, mask)
    # The published population variance with 1e-8 inside the root, and not the sample's of this file's formula.
    assert torch.allclose(whitened.double(), torch.tensor(expected["adv_whitened_biased"]).double(), atol=1e-6)
    assert not close(whitened, expected["adv_whitened_unbiased"])
    assert not close(whitened, wrong["whiten_over_padding"])


@DTYPES
def test_ppo_losses(dtype: torch.dtype) -> None:
    case = group("ppo")
    expected = case["expected"]
    x, mask = ppo_inputs(case, dtype)
    advantage = torch.tensor(expected["adv_whitened_unbiased"], dtype=dtype)
    returns = torch.tensor(expected["returns"], dtype=dtype)
    new, value = x["new_logp"].requires_grad_(), x["new_values"].requires_grad_()
    inside = {name: losses.keep(x[name], mask) for name in x}
    policy = losses.clipped_surrogate(inside["new_logp"], inside["old_logp"], advantage, case["cliprange"])
    error = losses.clipped_value_error(inside["new_values"], inside["old_values"], returns, case["cliprange_value"])
    policy, error = losses.keep(policy, mask), losses.keep(error, mask)
    assert close(policy.sum() / mask.sum(), expected["pg_loss_token_mean"])
    assert close((policy.sum(-1) / mask.sum(-1)).mean(), expected["pg_loss_sequence_mean"])
    assert close(error.sum() / mask.sum(), expected["vf_loss_token_mean"])
    assert close(error.sum() / mask.numel(), case["must_not"]["value_loss_without_mask"])
    (slope,) = gradient(policy.sum() / mask.sum(), new)
    assert close(slope, expected["grad_new_logp"])
    assert torch.isfinite(gradient(error.sum(), value)[0]).all()
    assert (slope[mask] == 0).double().mean() == expected["clipfrac"]
    kl = {name: f(inside["old_logp"], inside["new_logp"])[mask].mean() for name, f in KL.items()}
    assert close(kl["k1"], expected["approx_kl_k1"])
    assert close(kl["k3"], expected["approx_kl_k3"])
    to_ref = credit.kl_k1(inside["old_logp"], inside["ref_logp"]).sum(-1).mean()
    assert close(to_ref, expected["kl_to_ref_sequence_sum_mean_k1"])


KL = {"k1": credit.kl_k1, "k2": credit.kl_k2, "k3": credit.kl_k3}


@DTYPES
def test_kl_estimators(dtype: torch.dtype) -> None:
    case = group("kl_estimators")
    expected, wrong = case["expected"], case["must_not"]
    logits, other = tensor(case["policy_logits"], dtype), tensor(case["ref_logits"], dtype)
    every = torch.arange(4)
    logp, ref = (losses.row_logp(x.expand(4, 4), every) for x in (logits, other))
    p = logp.detach().exp()
    assert close(p, expected["p"])
    assert close(ref.detach().exp(), expected["q"])
    for name, estimator in KL.items():
        found = estimator(logp, ref)
        assert close(found, expected[name])
        average = (p * found).sum()
        assert close(average, expected[f"E_{name}"])
        assert close(gradient(average, logits)[0], expected[f"grad_{name}_as_loss"])
        if name != "k2":
            assert close(average, expected["exact_kl"])
            assert close((p * (found - average).square()).sum(), expected[f"var_{name}"])
        assert not close(found, wrong["coati_before_PR4338_sign_flipped_k3"])
        assert not close(average, wrong["E_sign_flipped"])
        assert not close(average, wrong["llava_rlhf_k1_clamped_at_0_expectation"])
    assert close(gradient((p * credit.kl_k2(logp, ref)).sum(), logits)[0], expected["grad_exact_kl"])
    backward = (ref.exp() * credit.kl_k1(ref, logp)).sum()
    assert close(backward, expected["forward_kl_ref_pi"])
    assert close(gradient(backward, logits)[0], expected["grad_k3_as_loss"])  # k3 as a loss descends the other KL


def test_kl_controller() -> None:
    case = group("kl_controller")
    controller = credit.AdaptiveKL(case["init"], case["target"], case["horizon"])
    found = [controller.update(torch.tensor(kl, dtype=torch.float64), case["n_steps"]) for kl in case["kl_sequence"]]
    assert close(torch.tensor(found, dtype=torch.float64), case["expected"]["beta_after"])

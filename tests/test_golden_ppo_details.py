"""The golden cases of tests/golden/ppo_details.json about PPO itself; its neighbour `_models` has the others.

The file's numbers have 10 significant digits, so float64 is held to a relative 1e-9 (plus 1e-12 for the zeros that
are printed as rounding noise), which is far inside the file's own `atol`; float32 is held to 1e-5. `WRONG_*` outputs
are what a plausible mistake gives and must be missed by more than that.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate import credit, losses

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "ppo_details.json").read_text())
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def claims(*names: str) -> Callable[[Any], Any]:
    """Run a test once per golden case, as its `case`."""
    return pytest.mark.parametrize("case", [pytest.param(GOLDEN[name], id=name) for name in names])


def close(actual: Any, expected: Any) -> bool:
    """Whether a result has the golden values: to the digits printed in float64, to 1e-5 in float32."""
    actual = torch.as_tensor(actual)
    rough = actual.dtype == torch.float32
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    return torch.allclose(actual.double(), expected, rtol=1e-5 if rough else 1e-9, atol=1e-5 if rough else 1e-12)


def tensors(case: dict[str, Any], dtype: torch.dtype, *names: str) -> list[Tensor]:
    """Inputs of a case as leaves that take a gradient."""
    return [torch.tensor(case["inputs"][name], dtype=dtype, requires_grad=True) for name in names]


def mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over the cells of a mask: what `step.optimise` makes of a sum and its count."""
    return losses.keep(x, mask).sum() / (x.numel() if mask is None else mask.sum())


def claimed() -> list[str]:
    """The names in every `@claims(…)` of both files, read from their source."""
    trees = [ast.parse(file.read_text()) for file in Path(__file__).parent.glob("test_golden_ppo_details*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    marks = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "claims"]
    return [ast.literal_eval(argument) for mark in marks for argument in mark.args]


def test_every_case_is_claimed_once() -> None:
    assert sorted(claimed()) == sorted(set(GOLDEN) - {"_meta"})
    assert len(claimed()) == GOLDEN["_meta"]["cases"] == 42


# --- whitening -------------------------------------------------------------------------------------------------------


@DTYPES
@claims("whiten_blog_3x3", "whiten_rand_3x6")
def test_whiten_uses_the_population_variance(case: dict[str, Any], dtype: torch.dtype) -> None:
    x = torch.tensor(case["inputs"]["x"], dtype=dtype)
    for shift in (True, False):
        result = credit.whiten(x, shift_mean=shift)
        assert close(result, case["outputs"][f"reference_biased_shift_mean_{shift}"])
        assert not close(result, case["outputs"][f"WRONG_unbiased_shift_mean_{shift}"])


@DTYPES
@claims("whiten_masked")
def test_whiten_within_a_mask(case: dict[str, Any], dtype: torch.dtype) -> None:
    x = torch.tensor(case["inputs"]["x"], dtype=dtype)
    mask = torch.tensor(case["inputs"]["mask"]).bool()
    for shift in (True, False):
        result = credit.whiten(x, mask, shift_mean=shift)
        assert close(result, case["outputs"][f"masked_biased_shift_mean_{shift}_after_fill0"])
        before = torch.tensor(case["outputs"][f"masked_biased_shift_mean_{shift}_before_fill"], dtype=torch.float64)
        assert close(result[mask], before[mask].tolist())


@DTYPES
@claims("whiten_constant_input")
def test_whiten_of_equal_numbers(case: dict[str, Any], dtype: torch.dtype) -> None:
    x = torch.tensor(case["inputs"]["x"], dtype=dtype)
    for shift in (True, False):
        assert close(credit.whiten(x, shift_mean=shift), case["outputs"][f"shift_mean_{shift}"])


# --- advantages, rewards, KL -----------------------------------------------------------------------------------------


@DTYPES
@claims("gae_default", "gae_g099_l09", "gae_lam1", "gae_lam0")
def test_gae(case: dict[str, Any], dtype: torch.dtype) -> None:
    rewards, values = tensors(case, dtype, "rewards", "values")
    advantages = credit.gae(rewards, values, None, case["inputs"]["gamma"], case["inputs"]["lam"])
    assert close(advantages, case["outputs"]["advantages_raw"])
    assert close(advantages + values, case["outputs"]["returns"])
    assert close(credit.whiten(advantages), case["outputs"]["advantages_whitened"])


@claims("adaptive_kl_sentiment_defaults", "adaptive_kl_toy_horizon")
def test_adaptive_kl(case: dict[str, Any]) -> None:
    given = case["inputs"]
    controller = credit.AdaptiveKL(given["init"], given["target"], given["horizon"])
    found = [controller.update(kl, steps) for kl, steps in given["current_and_nsteps"]]
    assert close(torch.tensor(found, dtype=torch.float64), case["outputs"]["beta_after_each"])
    assert controller.value == found[-1]


@DTYPES
@claims("reward_composition_lmhp_whiten_False", "reward_composition_lmhp_whiten_True")
def test_reward_composition_of_2019(case: dict[str, Any], dtype: torch.dtype) -> None:
    given, expected = case["inputs"], case["outputs"]
    logp, ref, scores = tensors(case, dtype, "logprobs", "ref_logprobs", "scores")
    everywhere = torch.ones_like(logp, dtype=torch.bool)
    rewards = credit.shape_reward(scores, logp, ref, everywhere, given["beta"])
    non_score = credit.shape_reward(torch.zeros_like(scores), logp, ref, everywhere, given["beta"])
    if case is GOLDEN["reward_composition_lmhp_whiten_True"]:
        rewards = credit.whiten(rewards, shift_mean=False)
    assert close(rewards, expected["rewards"])
    assert close(non_score, expected["non_score_reward"])
    assert close(credit.kl_k1(logp, ref), expected["kl"])
    assert close(credit.kl_k1(logp, ref).sum(-1).mean(), expected["objective_kl"])
    assert close((scores + non_score.sum(-1)).mean(), expected["objective_score_total"])
    assert close(losses.cross_entropy(logp, everywhere).sum(-1).mean(), expected["objective_entropy"])


@DTYPES
@claims("reward_composition_blog_example")
def test_the_blog_example_has_a_minus_before_beta(case: dict[str, Any], dtype: torch.dtype) -> None:
    kl, score = tensors(case, dtype, "kl", "score")
    everywhere = torch.ones_like(kl, dtype=torch.bool)
    beta = case["inputs"]["beta"]
    assert close(credit.shape_reward(score, kl, torch.zeros_like(kl), everywhere, beta), case["outputs"]["rewards"])
    printed = credit.shape_reward(score, kl, torch.zeros_like(kl), everywhere, -beta)
    assert not close(printed, case["outputs"]["rewards"])


@DTYPES
@claims("truncate_after_and_reject")
def test_truncation_and_penalty_of_2019(case: dict[str, Any], dtype: torch.dtype) -> None:
    given, expected = case["inputs"], case["outputs"]
    tokens, found = credit.truncate_after(
        torch.tensor(given["responses"]), given["truncate_token"], given["truncate_after"], given["pad_id"]
    )
    assert tokens.tolist() == expected["postprocessed"]
    assert found.int().tolist() == expected["valid"]
    scores = torch.tensor(given["rm_scores"], dtype=dtype)
    assert close(credit.missing_eos_penalty(scores, found, given["penalty"]), expected["scores"])
    subtracted = credit.missing_eos_penalty(scores, found, given["penalty"], "subtract")
    assert close(subtracted, [0.5, 1.0, 0.5, 1.0, 2.5, 3.0])


@claims("nplus_truncate_eos")
def test_truncation_at_the_first_eos(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["outputs"]
    responses = torch.tensor(given["responses"])
    tokens, found = credit.truncate_after(responses, given["eos_id"], 0, given["pad_id"])
    assert tokens.tolist() == expected["postprocessed"]
    assert found.int().tolist() == expected["contains_eos"]
    assert credit.last_true_index(tokens != given["pad_id"]).tolist() == expected["sequence_lengths"]


@DTYPES
@claims("nplus_rewards_gae_whiten_rewards_False", "nplus_rewards_gae_whiten_rewards_True")
def test_tldr_rollout_from_tokens_to_advantages(case: dict[str, Any], dtype: torch.dtype) -> None:
    given, expected = case["inputs"], case["outputs"]
    logp, ref, values, scores = tensors(case, dtype, "logprobs", "ref_logprobs", "values", "rm_scores")
    tokens, found = credit.truncate_after(torch.tensor(given["responses"]), given["eos_id"], 0, given["pad_id"])
    mask = tokens != given["pad_id"]
    last = credit.last_true_index(mask)
    value_mask = torch.arange(mask.shape[1]) <= last[:, None] + 1
    assert (~mask).int().tolist() == expected["padding_mask"]
    assert (~value_mask).int().tolist() == expected["padding_mask_p1"]
    scores = credit.missing_eos_penalty(scores, found, given["penalty"])
    assert close(scores, expected["scores_after_penalty"])
    kl = credit.kl_k1(losses.keep(logp, mask), losses.keep(ref, mask))
    assert close(kl, expected["kl"])
    shaped = credit.shape_reward(scores, logp, ref, mask, given["kl_coef"], "after")
    assert close(shaped, expected["rewards_before_whitening"])
    one = credit.shape_reward(torch.ones_like(scores), logp, logp, mask, 0.0, "after")
    assert one.argmax(-1).tolist() == expected["score_index"]
    rewards = credit.whiten(shaped, value_mask, shift_mean=False) if given["whiten_rewards"] else shaped
    assert close(rewards, expected["rewards"])
    raw = credit.gae(rewards, values, value_mask, given["gamma"], given["lam"])
    assert close(losses.keep(values, value_mask), expected["values_masked"])
    assert close(raw, expected["advantages_raw"])
    assert close(raw + losses.keep(values, value_mask), expected["returns"])
    assert close(credit.whiten(raw, mask), expected["advantages"])
    assert close(kl.sum(-1).mean(), expected["objective_kl"])
    assert close(-given["kl_coef"] * kl.sum(-1).mean(), expected["objective_non_score_reward"])
    entropy = losses.cross_entropy(logp, mask).sum(-1).mean()
    assert close(entropy, expected["objective_entropy_true_sampled"])
    assert not close(entropy, expected["objective_entropy_as_logged"])  # the reference counts −1 per padded place


# --- the PPO step ----------------------------------------------------------------------------------------------------


def ppo_terms(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surrogate and value error per token, and the leaves they came from."""
    given = case["inputs"]
    new, old, advantage = tensors(case, dtype, "new_logprobs", "old_logprobs", "advantages")
    value, old_value, returns = tensors(case, dtype, "vpred", "old_values", "returns")
    policy = losses.clipped_surrogate(new, old.detach(), advantage.detach(), given["cliprange"])
    error = losses.clipped_value_error(value, old_value.detach(), returns.detach(), given["cliprange_value"])
    return policy, error, new, value


def resting(policy: Tensor, leaf: Tensor) -> Tensor:
    """Where the clipped branch is strictly larger: there, and only there, the step is flat."""
    return torch.autograd.grad(policy.sum(), leaf, retain_graph=True)[0] == 0


@DTYPES
@claims("ppo_losses_unmasked")
def test_ppo_losses(case: dict[str, Any], dtype: torch.dtype) -> None:
    expected = case["outputs"]
    policy, error, new, value = ppo_terms(case, dtype)
    old = torch.tensor(case["inputs"]["old_logprobs"], dtype=dtype)
    total = mean(policy) + case["inputs"]["vf_coef"] * mean(error)
    assert close(mean(policy), expected["pg_loss"])
    assert close(mean(error), expected["vf_loss"])
    assert close(total, expected["total"])
    assert close(mean(credit.kl_k2(new, old)), expected["approxkl"])
    assert close(losses.clipped_surrogate(new, old, -torch.ones_like(old), math.inf), expected["ratio"])
    assert close(resting(policy, new).to(dtype).mean(), expected["pg_clipfrac"])
    assert close(resting(error, value).to(dtype).mean(), expected["vf_clipfrac"])
    total.backward()
    assert close(new.grad, expected["grad_new_logprobs"])
    assert close(value.grad, expected["grad_vpred"])


@DTYPES
@claims("ppo_losses_masked_nplus")
def test_ppo_losses_within_masks(case: dict[str, Any], dtype: torch.dtype) -> None:
    given, expected = case["inputs"], case["outputs"]
    mask, value_mask = ~torch.tensor(given["padding_mask"]).bool(), ~torch.tensor(given["padding_mask_p1"]).bool()
    policy, error, new, value = ppo_terms(case, dtype)
    old = torch.tensor(given["old_logprobs"], dtype=dtype)
    total = mean(policy, mask) + given["vf_coef"] * mean(error, value_mask)
    assert close(mean(policy, mask), expected["pg_loss"])
    assert close(mean(error, value_mask), expected["vf_loss"])
    assert close(total, expected["total"])
    change = credit.kl_k2(new, old)
    assert close(mean(change, mask), expected["approxkl_masked"])
    assert not close(mean(change, mask), expected["approxkl_logged_unmasked"])
    assert close(mean(resting(policy, new).to(dtype), mask), expected["pg_clipfrac_masked"])
    assert close(mean(resting(error, value).to(dtype), value_mask), expected["vf_clipfrac"])
    assert close(losses.clipped_surrogate(new, old, -torch.ones_like(old), math.inf), expected["ratio"])
    total.backward()
    assert close(new.grad, expected["grad_new_logprobs"])
    assert close(value.grad, expected["grad_vpred"])


@DTYPES
@claims("microbatch_mean_of_means")
def test_a_mean_of_means_is_another_loss(case: dict[str, Any], dtype: torch.dtype) -> None:
    source = GOLDEN[case["inputs"]["see"]]
    given = source["inputs"]
    mask, value_mask = ~torch.tensor(given["padding_mask"]).bool(), ~torch.tensor(given["padding_mask_p1"]).bool()
    policy, error, _, _ = ppo_terms(source, dtype)
    policy, error = losses.keep(policy, mask), given["vf_coef"] * losses.keep(error, value_mask)
    rows = policy.sum(-1) / mask.sum(-1) + error.sum(-1) / value_mask.sum(-1)
    assert close(rows, case["outputs"]["loss_per_row"])
    assert close(rows.mean(), case["outputs"]["mean_of_row_losses"])
    parts = [policy[i : i + 2].sum() / mask.sum() + error[i : i + 2].sum() / value_mask.sum() for i in (0, 2, 4)]
    assert close(torch.stack(parts).sum(), case["outputs"]["pooled_loss"])  # sums divided once: any split agrees
    assert not close(rows.mean(), case["outputs"]["pooled_loss"])


@DTYPES
@claims("first_update_sanity")
def test_the_first_minibatch_has_ratio_one(case: dict[str, Any], dtype: torch.dtype) -> None:
    old, advantages = tensors(case, dtype, "old_logprobs", "advantages")
    new, expected = old.detach().clone().requires_grad_(), case["outputs"]
    policy = losses.clipped_surrogate(new, old, advantages, 0.2)
    assert mean(policy).item() == pytest.approx(expected["pg_loss"], abs=1e-12 if dtype == torch.float64 else 1e-6)
    ratio = losses.clipped_surrogate(new, old, -torch.ones_like(old), 0.2)
    assert ratio.mean().item() == expected["ratio_mean"]
    assert resting(policy, new).double().mean().item() == expected["pg_clipfrac"]
    assert mean(credit.kl_k2(new, old)).item() == expected["approxkl"]


@claims("blog_adam_table")
def test_the_published_approxkl_is_k2(case: dict[str, Any]) -> None:
    """Half the second moment of the log-ratio: from its published mean and variance, by any law that has them."""
    table = {name: torch.tensor(row, dtype=torch.float64) for name, row in case["outputs"].items()}
    middle, spread = table["logprob_diff_mean"], table["logprob_diff_var"].sqrt()
    log_ratio = torch.stack([middle - spread, middle + spread])
    torch.testing.assert_close(
        credit.kl_k2(log_ratio, torch.zeros_like(log_ratio)).mean(0), table["policy/approxkl"], rtol=2e-6, atol=0
    )
    assert (credit.kl_k1(log_ratio, torch.zeros_like(log_ratio)).mean(0) > 3 * table["policy/approxkl"]).all()

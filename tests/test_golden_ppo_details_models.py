"""The golden cases of tests/golden/ppo_details.json about reward models, alignment, data and evaluation.

Tolerances as in test_golden_ppo_details.py, which holds the cases about PPO itself and checks that all 42 are claimed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from palate import credit, losses, optim
from palate.algorithms import ppo
from palate.batches import Tokens
from palate.data.queries import books_query, left_pad, tldr_query
from palate.evaluation.win_rate import preferred
from palate.models.heads import fresh_head, head_std
from palate.models.trunk import position_ids
from palate.randomness import key
from palate.step import minibatches

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


# --- reward models ---------------------------------------------------------------------------------------------------


@DTYPES
@claims("best_of_4_loss")
def test_best_of_four(case: dict[str, Any], dtype: torch.dtype) -> None:
    expected = case["outputs"]
    rewards = torch.tensor(case["inputs"]["rewards"], dtype=dtype, requires_grad=True)
    best = torch.tensor(case["inputs"]["best"])
    rows = losses.best_of(rewards, best)
    assert close(rows, expected["per_row"])
    assert close(rows.mean(), expected["loss"])
    assert (rewards.argmax(-1) == best).double().mean().item() == expected["accuracy"]
    rows.mean().backward()
    assert close(rewards.grad, expected["grad_rewards"])
    assert close(losses.best_of(3 * rewards + 7, best).mean(), expected["loss_with_gain3_bias7"])
    assert close(losses.best_of(torch.zeros_like(rewards), best).mean(), expected["uniform_loss"])
    bias = torch.zeros((), dtype=dtype, requires_grad=True)
    losses.best_of(rewards.detach() + bias, best).sum().backward()
    assert abs(float(bias.grad)) < 1e-6  # type: ignore[arg-type]


@DTYPES
@claims("pairwise_loss")
def test_pairs(case: dict[str, Any], dtype: torch.dtype) -> None:
    expected = case["outputs"]
    chosen, rejected = (
        torch.tensor(case["inputs"][n], dtype=dtype, requires_grad=True) for n in ("chosen", "rejected")
    )
    loss = losses.bradley_terry(chosen, rejected).mean()
    assert close(loss, expected["loss"])
    both = torch.stack([chosen, rejected], -1)
    assert close(losses.best_of(both, torch.zeros(4, dtype=torch.long)).mean(), expected["two_way_ce"])
    assert close(losses.ranking(both, torch.tensor([[0, 1]] * 4)).mean(), expected["loss"])
    assert (chosen > rejected).double().mean().item() == expected["accuracy"]
    loss.backward()
    assert close(chosen.grad, expected["grad_chosen"])
    assert close(rejected.grad, expected["grad_rejected"])


@DTYPES
@claims("other_label_losses")
def test_numbers_as_labels(case: dict[str, Any], dtype: torch.dtype) -> None:
    given = {name: torch.tensor(row, dtype=dtype) for name, row in case["inputs"].items()}
    expected = case["outputs"]
    rating = losses.rating_error(given["rating_pred"], given["rating_label"])
    compare = losses.comparison_error(given["compare_r0"], given["compare_r1"], given["compare_difference"])
    assert close(rating.mean(), expected["rating_loss"])
    assert close(compare.mean(), expected["compare_loss"])
    # Targets of the normalisation before training are the labels' own moments: what gain_and_bias scales back from.
    for labels, name in ((given["rating_label"], "rating"), (given["compare_difference"] / 2, "compare")):
        gain, bias = credit.gain_and_bias(labels)
        assert 1 / gain == pytest.approx(expected[f"{name}_target_std"], rel=1e-6)
        assert -bias / gain == pytest.approx(expected[f"{name}_target_mean"], rel=1e-6)
    correlation = (credit.whiten(given["rating_pred"]) * credit.whiten(given["rating_label"])).mean()
    assert correlation.item() == pytest.approx(expected["rating_corr"], abs=case["atol"])


@claims("reward_gain_bias")
def test_gain_and_bias(case: dict[str, Any]) -> None:
    raw = torch.tensor(case["inputs"]["raw_rewards"], dtype=torch.float64)
    for source, sample in (("openai_biased", False), ("pytorch_repo_unbiased", True)):
        for name, mean, std in (("std_mean0_std1", 0.0, 1.0), ("std_mean05_std2", 0.5, 2.0)):
            expected = case["outputs"][f"{source}_{name}"]
            gain, bias = credit.gain_and_bias(raw, mean, std, sample=sample)
            assert (gain, bias) == pytest.approx((expected["gain"], expected["bias"]), rel=1e-9)
            assert close(gain * raw + bias, expected["normalized"])
            assert gain != pytest.approx(credit.gain_and_bias(raw, mean, std, sample=not sample)[0], rel=1e-3)
    gain, bias = credit.gain_and_bias(raw, std=None)
    assert (gain, -bias) == (1.0, case["outputs"]["nplus_bias_only"]["bias"])
    assert close(raw + bias, case["outputs"]["nplus_bias_only"]["normalized"])


@claims("head_init_std")
def test_fresh_heads(case: dict[str, Any]) -> None:
    expected = case["outputs"]
    for width, std in expected["theory_std"].items():
        assert math.isclose(head_std(int(width), "reference"), std, rel_tol=1e-8)
        assert head_std(int(width), "zero") == expected["value_head_std_lmhp"]
    for width, seen in expected["empirical_torch_seed1_in_this_order"].items():
        head, room = fresh_head(int(width), "reference", 1), 5 / math.sqrt(2 * int(width))
        drawn = head.last.weight.std().item()
        assert drawn == pytest.approx(expected["theory_std"][width], rel=room)
        assert seen["empirical_std"] == pytest.approx(drawn, rel=2 * room)
        assert head.last.bias.tolist() == [seen["bias"]]
        assert not fresh_head(int(width), "zero", 1).last.weight.any()
    variance = 768 * head_std(768, "reference") ** 2
    assert math.isclose(variance, expected["output_variance_if_hidden_is_unit_variance"]["768"], rel_tol=1e-9)


@claims("rm_extract_index")
def test_where_the_reward_is_read(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["outputs"]
    tokens = torch.tensor(given["tokens"])
    index = credit.last_true_index(tokens != given["pad_id"])
    assert index.tolist() == expected["index"]
    assert index.tolist() != expected["WRONG_index_without_context_length"]
    assert (10.0 * index).tolist() == expected["reward"]
    right = credit.last_true_index(torch.tensor(given["right_padded"]) != given["pad_id"])
    assert (10.0 * right).tolist() == expected["right_padded_reward"]


# --- tokens, positions, probabilities --------------------------------------------------------------------------------


@DTYPES
@claims("sft_loss")
def test_sft_loss_skips_padding_only(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.tensor(case["inputs"]["logits"], dtype=dtype, requires_grad=True)
    tokens = torch.tensor(case["inputs"]["tokens"])
    targets = tokens != case["inputs"]["pad_id"]
    targets[:, 0] = False
    loss = losses.cross_entropy(losses.token_logp(logits, tokens), targets).sum() / targets.sum()
    assert targets.sum() == case["outputs"]["n_targets"]
    assert close(loss, case["outputs"]["loss"])
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, -1] == 0).all()


@DTYPES
@claims("logprob_temperature")
def test_temperature_divides_the_logits(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits, labels = torch.tensor(case["inputs"]["logits"], dtype=dtype), torch.tensor(case["inputs"]["labels"])
    for name, expected in case["outputs"].items():
        temperature = float(name.removeprefix("T="))
        assert close(losses.row_logp(logits, labels, temperature), expected["logprobs"])
        assert close(losses.row_entropy(logits, temperature), expected["entropy"])
        rows = torch.cat([logits, logits[:, :1]], 1)  # what is said after the last token is nobody's probability
        aligned = losses.token_logp(rows, torch.cat([labels[:, :1], labels], 1), temperature)
        assert close(aligned[:, 1:], expected["logprobs"])
        assert (aligned[:, 0] == 0).all()
        if temperature != 1.0:
            assert not close(losses.row_logp(logits, labels), expected["logprobs"])


@claims("logit_slice_alignment")
def test_token_t_is_predicted_one_place_before(case: dict[str, Any]) -> None:
    given = case["inputs"]
    places = torch.tensor(given["positions"], dtype=torch.float64)
    logits = torch.stack([places, torch.zeros_like(places)], -1)[None]  # position p says token 0 with log-odds p
    logp = losses.token_logp(logits, torch.zeros(1, len(places), dtype=torch.long))
    log_odds = logp - torch.log1p(-logp.exp())
    answer = log_odds[0, given["context_length"] :]
    assert answer.tolist() == pytest.approx(case["outputs"]["slice"])
    assert len(answer) == given["response_length"]


@claims("padding_positions")
def test_positions_skip_padding(case: dict[str, Any]) -> None:
    expected = case["outputs"]
    tokens = torch.tensor(case["inputs"]["tokens"])
    real = tokens != case["inputs"]["pad_id"]
    assert position_ids(real).tolist() == expected["openai_positions"]
    present = [credit.last_true_index(real[:, : t + 1]) for t in range(real.shape[1])]
    assert torch.stack(present, 1).tolist() == expected["openai_last_present_index"]
    left = torch.tensor(expected["left_attention_mask"]).bool()
    assert position_ids(left).tolist() == expected["left_positions_exclusive_cumsum"]
    assert position_ids(left)[left].tolist() == torch.tensor(expected["hf_generate_positions"])[left].tolist()
    assert tokens[real].tolist() == torch.tensor(expected["left_padded"])[left].tolist()


# --- batches, seeds, judges ------------------------------------------------------------------------------------------


def numbered(rows: int) -> Tokens:
    tokens = torch.arange(rows)[:, None]
    return Tokens(tokens, torch.ones_like(tokens).bool(), torch.ones_like(tokens).bool())


@claims("minibatch_partition")
def test_minibatches_are_slices_of_a_permutation(case: dict[str, Any]) -> None:
    order, parts = case["inputs"]["permutation"], case["inputs"]["nminibatches"]
    shuffled = numbered(len(order)).select(torch.tensor(order))
    found = list(shuffled.split(len(order) // parts))
    assert [part.tokens_BT[:, 0].tolist() for part in found] == case["outputs"]["minibatches"]
    micro = [[m.tokens_BT[:, 0].tolist() for m in part.split(part.size // 2)] for part in found]
    assert micro == case["outputs"]["microbatches"]
    passes = [[part.tokens_BT[:, 0].tolist() for part in minibatches(numbered(8), parts, 1, "pass", i)] for i in (0, 1)]
    assert passes[0] != passes[1]
    assert all(sorted(chain(*drawn)) == list(range(8)) for drawn in passes)


@claims("seeds_and_sizes")
def test_batch_algebra_and_seeds(case: dict[str, Any]) -> None:
    expected, ranks = case["outputs"], 8
    asked = ppo.Algorithm()
    assert optim.updates(1_000_000, expected["lmhp"]["batch"]) == expected["lmhp"]["updates"]
    steps = expected["lmhp"]["updates"] * asked.passes * asked.minibatches
    assert steps == expected["lmhp"]["grad_steps"]
    minibatch = next(iter(minibatches(numbered(expected["lmhp"]["batch"]), asked.minibatches, 1)))
    assert minibatch.size == expected["lmhp"]["minibatch"]
    for size in ("nplus_1b", "nplus_28b", "nplus_69b"):
        table = expected[size]
        local = numbered(table["batch"] // ranks)
        assert local.size == table["local"]
        assert len(list(local.split(table["micro"]))) == table["accum"]
    # The references give rank r the seed s + 100003·r, so that ranks answer differently. Here an answer's draws hang on
    # its prompt and its number alone: distinct wherever it is computed, and the same whatever the number of ranks.
    assert expected["local_seeds"] == [case["inputs"]["seed"] + rank * 100_003 for rank in case["inputs"]["ranks"]]
    answers = {key(1, "3-rlhf", 0, f"prompt {i}", sample, "draw") for i in range(512) for sample in range(4)}
    assert len(answers) == 512 * 4


@claims("process_query")
def test_a_long_post_is_cut_at_line_breaks(case: dict[str, Any]) -> None:
    given, pad = case["inputs"], -1
    for name, post in given["examples"].items():
        expected = case["outputs"][name]
        query, tokens = tldr_query(post, lambda text: [ord(c) for c in text], given["length"], given["format"])
        assert query == expected["query"]
        padded = left_pad(tokens, given["length"], pad)
        assert len(padded) == expected["length"]
        assert padded.count(pad) == padded.index(ord(query[0])) == expected["n_pad"] == expected["first_nonpad"]


@claims("books_query_prep")
def test_book_queries_run_from_sentence_to_sentence(case: dict[str, Any]) -> None:
    given = case["inputs"]
    numbers = given["query_length"], given["start_token"], given["end_token"], given["pad"]
    assert [books_query(tokens, *numbers) for tokens in given["tokens"]] == case["outputs"]["queries"]


@claims("judge_label_mapping")
def test_a_judge_names_ours_by_the_exact_letter(case: dict[str, Any]) -> None:
    found = [int(preferred(shuffled, reply)) for shuffled, reply in case["inputs"]["cases"]]
    assert found == case["outputs"]["ours_preferred"]

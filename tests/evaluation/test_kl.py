"""Sequence KL: by hand, unbiased against the exact sum over all answers, and through a cast of real tiny models."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from palate.cast import Cast, Seat
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.evaluation.kl import kl_to_reference, sequence_kl
from palate.models.make import Make, make
from palate.randomness import key

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())["kl_estimators"]


def test_by_hand_with_masked_cells_holding_anything():
    action_BT = torch.tensor([[False, True, True], [False, True, False]])
    logp_BT = torch.tensor([[9.0, -1.0, -2.0], [9.0, -3.0, 77.0]])
    ref_BT = torch.tensor([[-9.0, -2.0, -2.5], [0.0, -2.0, -55.0]])
    found = sequence_kl(logp_BT, ref_BT, action_BT)
    assert found.mean == pytest.approx((1.5 - 1.0) / 2)
    assert found.standard_error == pytest.approx(2.5 / 2)
    assert found.answers == 2


def test_its_expectation_is_the_exact_divergence_of_the_golden_file():
    """Each outcome once per 10,000 of its probability: the mean of k1 is then Σ p log p/q."""
    policy = torch.tensor(GOLDEN["policy_logits"], dtype=torch.float64).log_softmax(-1)
    reference = torch.tensor(GOLDEN["ref_logits"], dtype=torch.float64).log_softmax(-1)
    drawn = torch.tensor(np.repeat(range(4), np.rint(np.exp(policy.numpy()) * 1e6).astype(int)))
    mask = torch.ones(drawn.shape[0], 1, dtype=torch.bool)
    found = sequence_kl(policy[drawn][:, None], reference[drawn][:, None], mask)
    assert found.mean == pytest.approx(GOLDEN["expected"]["exact_kl"], abs=1e-5)
    assert found.standard_error == pytest.approx(math.sqrt(GOLDEN["expected"]["var_k1"] / drawn.shape[0]), rel=1e-3)
    assert abs(found.mean - GOLDEN["must_not"]["llava_rlhf_k1_clamped_at_0_expectation"]) > 1e-3


@pytest.fixture(scope="module")
def two_models():
    small = Make(hidden_size=16, layers=1, heads=2, context=32, vocabulary=300)
    texts = ["one two three four five"] * 4
    return make(small, texts, key("policy")), make(small, texts, key("reference"))


def rolled_out(model, temperature, **more):
    engine = LocalEngine(model.trunk, model.tokenizer, Sampling(temperature=temperature, max_new_tokens=6, **more))
    return engine.generate([[65, 66]] * 12, [key("draw", i) for i in range(12)])


def logp_of_a_row(trunk, tokens, start, temperature):
    """Σ log p of the tokens from `start` on, one row alone, by a softmax over the whole vocabulary at every place."""
    real = torch.ones(1, len(tokens), dtype=torch.bool)
    hidden = trunk.hidden(torch.tensor([tokens]), real)[0]
    logp = (trunk.logits(hidden).double() / temperature).log_softmax(-1)
    return sum(float(logp[t - 1, tokens[t]]) for t in range(start, len(tokens)))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_it_is_the_difference_of_two_teacher_forced_sums_at_one_temperature(two_models, temperature):
    policy, reference = two_models
    rollouts = rolled_out(policy, temperature)
    expected = []
    for tokens, real in zip(rollouts.tokens_BT, rollouts.real_BT, strict=True):
        row = tokens[real].tolist()
        ours, theirs = (logp_of_a_row(m.trunk, row, 2, temperature) for m in (policy, reference))
        expected.append(ours - theirs)
    found = kl_to_reference(Cast({"reference": Seat(reference.trunk, None, None)}), rollouts)
    assert found.mean == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    itself = kl_to_reference(Cast({"reference": Seat(policy.trunk, None, None)}), rollouts)
    assert itself.mean == pytest.approx(0, abs=1e-5)


def test_how_many_rows_at_a_time_does_not_matter(two_models):
    policy, reference = two_models
    rollouts = rolled_out(policy, 1.0)
    seats = Cast({"reference": Seat(reference.trunk, None, None)})
    whole = kl_to_reference(seats, rollouts).mean
    seats.budget = 20
    assert kl_to_reference(seats, rollouts).mean == pytest.approx(whole, rel=1e-5)


def test_cutting_the_distribution_is_itself_a_distance(two_models):
    """Top-k keeps the likeliest tokens only; that policy differs from the model it was cut from."""
    policy, _ = two_models
    found = kl_to_reference(Cast({"reference": Seat(policy.trunk, None, None)}), rolled_out(policy, 1.0, top_k=3))
    assert found.mean > 1

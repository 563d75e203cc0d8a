"""RLOO: leave-one-out advantages with the KL inside the reward, answers or tokens as actions, a run that resumes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palate.algorithms.rloo import Algorithm
from palate.settings import PalateError, build
from tests.algorithms import graded_cases as cases
from tests.algorithms.resuming import goes_on
from tests.stages import tiny_runs


def prepared(algorithm: Algorithm, seed: int = 0) -> Any:
    cast, scored = cases.told(seed)
    with torch.no_grad():
        return cast, scored, algorithm.prepare(cast, scored)  # type: ignore[arg-type]


def advantages_by_hand(cast: Any, scored: Any, beta: float) -> list[float]:
    """Ahmadian et al. 2024, eq. 8, in a loop: r_i − β Σ_t (log π − log π_ref), minus the others' mean."""
    logp, ref, score = (x.detach().numpy() for x in (cast.said["policy"], cast.said["reference"], scored.score_B))
    reward = [score[b] - beta * sum(logp[b, t] - ref[b, t] for t in cases.cells(b)) for b in range(8)]
    found = []
    for b in range(8):
        others = [reward[i] for i in range(8) if i // 4 == b // 4 and i != b]
        found.append(reward[b] - sum(others) / 3)
    return found


def test_advantages_are_those_of_the_paper_with_kl_inside_the_reward() -> None:
    cast, scored, batch = prepared(Algorithm())
    for b, expected in enumerate(advantages_by_hand(cast, scored, 0.2)):
        inside = batch.advantage_BT[b, list(cases.cells(b))]
        assert torch.allclose(inside, torch.full_like(inside, expected), rtol=1e-12, atol=1e-12)
        assert float(batch.advantage_BT[b].abs().sum()) == pytest.approx(abs(expected) * cases.LENGTHS[b])
    assert batch.logp_BT.equal(cast.said["policy"].detach()), "old log-probabilities are a fresh pass by default"
    assert cast.asked == ["reference", "policy"]


def test_normalised_advantages_have_mean_0_and_variance_1_over_answers() -> None:
    cast, scored, batch = prepared(Algorithm(normalize_advantages=True))
    raw = np.array(advantages_by_hand(cast, scored, 0.2))
    expected = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-8)
    assert batch.advantage_BT[:, cases.START].tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_beta_adapts_to_the_kl_of_whole_answers() -> None:
    cast, _, batch = prepared(Algorithm(target_kl=0.5, horizon=100.0))
    gap = (cast.said["policy"] - cast.said["reference"]).detach()
    kl = np.mean([float(gap[b, list(cases.cells(b))].sum()) for b in range(8)])
    error = min(max(kl / 0.5 - 1, -0.2), 0.2)
    assert batch.memory["kl_coef"] == pytest.approx(0.2 * (1 + error * 8 / 100))
    assert batch.metrics["objective/kl"] == pytest.approx(kl)
    assert prepared(Algorithm())[2].memory == {"kl_coef": 0.2}


@pytest.mark.parametrize("action", ["sequence", "token"])
def test_the_loss_against_loops(action: Any) -> None:
    """PPO's clip on the ratio of the answer (TRL's `RLOOTrainer`) or of each token; divided by answers in both."""
    algorithm = Algorithm(action=action, cliprange=0.1, old_logprobs="sampled")
    cast, scored, batch = prepared(algorithm)
    loss = algorithm.loss(cast, batch)
    expected = 0.0
    new, old = cast.said["policy"].detach().numpy(), scored.rollouts.logp_BT.numpy()
    clipped = 0
    for b in range(8):
        advantage = float(batch.advantage_BT[b, cases.START])
        logs = [new[b, t] - old[b, t] for t in cases.cells(b)]
        for log in [sum(logs)] if action == "sequence" else logs:
            ratio = math.exp(log)
            expected += max(-advantage * ratio, -advantage * min(max(ratio, 0.9), 1.1)) / 8
            clipped += -advantage * min(max(ratio, 0.9), 1.1) > -advantage * ratio
    assert cases.value(loss, batch) == pytest.approx(expected, rel=1e-12)
    mean = loss.metrics["policy/clipfrac_avg"]
    assert float(mean.total) == clipped
    assert mean.count == (8 if action == "sequence" else sum(cases.LENGTHS))
    assert loss.metrics["val/ratio"].count == sum(cases.LENGTHS), "the ratio is told of tokens always"


def test_at_ratio_one_both_actions_have_the_gradient_of_reinforce() -> None:
    for action in ("sequence", "token"):
        algorithm = Algorithm(action=action)  # type: ignore[arg-type]
        cast, _, batch = prepared(algorithm)
        loss = algorithm.loss(cast, batch)
        found = cases.gradient(loss, cast.said["policy"], batch)
        torch.testing.assert_close(found, -batch.advantage_BT / 8, rtol=1e-12, atol=1e-12)
        assert float(loss.metrics["val/ratio"].total.detach()) == loss.metrics["val/ratio"].count
        assert float(loss.metrics["policy/clipfrac_avg"].total) == 0


def test_the_expected_gradient_is_that_of_score_minus_beta_kl() -> None:
    """All answers of a table enumerated; an infinite group's baseline is the mean, so any constant will do."""
    cast, likely_B, scored = cases.table()
    algorithm = Algorithm(num_generations=27)
    with torch.no_grad():
        batch = algorithm.prepare(cast, scored)  # type: ignore[arg-type]
    weighed = replace(batch, weight_BT=likely_B[:, None].expand_as(batch.logp_BT) * 27)
    for action in ("sequence", "token"):
        loss = Algorithm(num_generations=27, action=action).loss(cast, weighed)  # type: ignore[arg-type]
        found = cases.gradient(loss, cast.logits["policy"], weighed)
        logp, ref = (cases.table_logp(cast.logits[r]).sum(-1) for r in ("policy", "reference"))
        value = (logp.exp() * (scored.score_B - 0.3 * (logp - ref))).sum()
        exact = -torch.autograd.grad(value, cast.logits["policy"])[0] * 27 / 26  # the baseline leaves one out
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_equal_scores_push_nowhere() -> None:
    cast, scored = cases.told()
    scored = replace(scored, score_B=torch.full_like(scored.score_B, 0.3), memory={"kl_coef": 0.0})
    for algorithm in (Algorithm(), Algorithm(normalize_advantages=True)):
        batch = algorithm.prepare(cast, scored)  # type: ignore[arg-type]
        assert batch.metrics["frac_reward_zero_std"] == 1.0
        found = cases.gradient(algorithm.loss(cast, batch), cast.said["policy"], batch)  # type: ignore[arg-type]
        assert float(found.abs().max()) < 1e-12


def test_samples_of_another_policy_are_weighed() -> None:
    """Sequence level: the ratio of whole answers, cut at the cap or masked beyond it; the mismatch is reported."""
    for mode, beyond in (("sequence_truncate", 1.5), ("sequence_mask", 0.0)):
        algorithm = Algorithm(importance_correction=mode, importance_cap=1.5)  # type: ignore[arg-type]
        cast, scored, batch = prepared(algorithm)
        change = cast.said["policy"].detach() - scored.rollouts.logp_BT
        weights = [math.exp(sum(float(change[b, t]) for t in cases.cells(b))) for b in range(8)]
        assert max(weights) > 1.5 > min(weights)
        kept = [beyond if w > 1.5 else w for w in weights]
        assert [float(batch.weight_BT[b, cases.START]) for b in range(8)] == pytest.approx(kept)
        loss = algorithm.loss(cast, batch)
        raw = [float(batch.advantage_BT[b, cases.START]) for b in range(8)]
        assert cases.value(loss, batch) == pytest.approx(-np.mean(np.array(kept) * raw))
        ratios = [math.exp(float(change[b, t])) for b in range(8) for t in cases.cells(b)]
        for name, figure in (("mean", np.mean(ratios)), ("min", min(ratios)), ("max", max(ratios))):
            assert batch.metrics[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(figure)
        assert batch.metrics["sampling/kl"] == pytest.approx(np.mean([r - 1 - math.log(r) for r in ratios]))
        assert batch.metrics["sampling/kl"] > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_generations": 1}, "1 answer a prompt has no siblings"),
        ({"importance_correction": "token_mask"}, "the action is the whole answer"),
        ({"importance_correction": "sequence_mask", "old_logprobs": "sampled"}, "Set old_logprobs: recomputed"),
        ({"beta": 0.1}, "no setting 'beta'"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PalateError, match=said):
        build("algorithms", {"kind": "rloo", **given})


@pytest.mark.parametrize("given", [{}, {"action": "token", "importance_correction": "token_truncate"}])
def test_micro_batches_garbage_and_padding(given: dict[str, Any]) -> None:
    cases.keeps_the_laws(Algorithm(**given))


def test_dense_rewards_are_the_scalar_bit_for_bit() -> None:
    cast, scored = cases.told()
    dense = torch.zeros(scored.token_reward_BT.shape, dtype=torch.float64)
    for b in range(8):
        dense[b, cases.cells(b)[-1]] = scored.score_B[b]
    other = replace(scored, score_B=scored.score_B * 0, token_reward_BT=dense)
    ours, theirs = (Algorithm().prepare(cast, s).advantage_BT for s in (scored, other))  # type: ignore[arg-type]
    assert ours.equal(theirs)


def test_a_real_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    given = {"kind": "rloo", "num_generations": 4, "num_iterations": 2, "num_mini_batches": 2, "target_kl": 0.5}
    rows = goes_on(tmp_path, Algorithm, cases.stage(tmp_path, given), 3)
    assert all(row["first_minibatch/ratio_error"] < 1e-5 for row in rows)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["objective/kl"] != 0
    tiny_runs.run(
        tmp_path, cases.stage(tmp_path, {**given, "action": "token"}, layout={"kind": "adapters"}), name="lora"
    )

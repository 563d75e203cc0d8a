"""GRPO and its variants against TRL's formulas written by hand, the gradients of KL losses, runs that resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate.algorithms import _graded
from palate.algorithms.grpo import Algorithm
from palate.settings import PalateError, build
from tests.algorithms import graded_cases as cases
from tests.algorithms.resuming import goes_on
from tests.stages import tiny_runs


def algorithm_of(**given: Any) -> Algorithm:
    return Algorithm(num_generations=4, **given)


def prepared(algorithm: Algorithm, **changes: Any) -> Any:
    cast, scored = cases.told()
    scored = replace(scored, **changes)
    with torch.no_grad():
        return cast, scored, algorithm.prepare(cast, scored)  # type: ignore[arg-type]


# --- advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_advantages_against_plain_python(scale: Any, kl_in: Any) -> None:
    algorithm = algorithm_of(scale_rewards=scale, kl_in=kl_in, beta=0.1)
    cast, scored, batch = prepared(algorithm)
    gap = (cast.said["policy"] - cast.said["reference"]).detach()
    paid = 0.1 if kl_in == "reward" else 0.0
    reward = [float(scored.score_B[b]) - paid * sum(float(gap[b, t]) for t in cases.cells(b)) for b in range(8)]
    for b in range(8):
        group = reward[b // 4 * 4 : b // 4 * 4 + 4]
        mean = sum(group) / 4
        among = {"group": group, "batch": reward, "none": []}[scale]
        middle = sum(among) / max(len(among), 1)
        deviation = math.sqrt(sum((r - middle) ** 2 for r in among) / len(among) + 1e-8) if among else 1.0
        for t in range(batch.advantage_BT.shape[1]):
            expected = (reward[b] - mean) / deviation if t in cases.cells(b) else 0.0
            assert float(batch.advantage_BT[b, t]) == pytest.approx(expected, abs=1e-9)


def test_a_group_of_equal_scores_gives_no_nan_and_no_gradient() -> None:
    for scale in ("group", "batch", "none"):
        algorithm = algorithm_of(scale_rewards=scale, beta=0)
        cast, _, batch = prepared(algorithm, score_B=torch.tensor([1 / 3] * 4 + [0.0, 1.0, 1.0, 0.0]).double())
        assert batch.metrics["frac_reward_zero_std"] == 0.5
        found = cases.gradient(algorithm.loss(cast, batch), cast.said["policy"], batch)
        assert torch.isfinite(found).all()
        assert float(found[:4].abs().max()) == 0.0
        assert float(found[4:].abs().max()) > 0.0


def test_beta_0_needs_no_reference() -> None:
    algorithm = algorithm_of(beta=0)
    assert algorithm.needs == ()
    assert algorithm_of().needs == ("reference",)
    cast, _, batch = prepared(algorithm)
    algorithm.loss(cast, batch)
    assert "reference" not in cast.asked
    assert "objective/kl" not in batch.metrics


# --- the loss, as TRL 1.16 has it -------------------------------------------------------------------------------------


def trl(cast: Any, batch: Any, given: dict[str, Any], weight: Tensor) -> Tensor:
    """`GRPOTrainer._compute_loss`, re-derived from its documentation; dense, with 0/1 masks, no helper of ours."""
    m = torch.zeros(8, batch.logp_BT.shape[1], dtype=torch.float64)
    for b in range(8):
        m[b, list(cases.cells(b))] = 1.0
    logp, ref = (torch.where(m > 0, cast.said[r], 0.0) for r in ("policy", "reference"))
    old = torch.where(m > 0, batch.logp_BT, 0.0)
    advantage = batch.advantage_BT[:, cases.START].unsqueeze(1)
    log_weight = logp - old
    if given.get("importance_level") == "sequence":
        log_weight = ((log_weight * m).sum(1) / m.sum(1)).unsqueeze(1).expand_as(m)
    coef_1 = log_weight.exp()
    high = given.get("epsilon_high", 0.2)
    coef_2 = coef_1.clamp(1 - 0.2, 1 + high)
    if given.get("surrogate") == "cispo":
        loss = -coef_1.clamp(max=1 + high).detach() * advantage * logp
    else:
        first = coef_1 if "delta" not in given else coef_1.clamp(max=given["delta"])
        loss = -torch.min(first * advantage, coef_2 * advantage)
    loss = loss * weight
    if given.get("kl_in") == "loss":
        kl = {"k1": logp - ref, "k2": (logp - ref) ** 2 / 2, "k3": (ref - logp).exp() - (ref - logp) - 1}
        kl["k3_ratio"] = kl["k3"] * (logp - old).exp()
        loss = loss + 0.3 * kl[given["kl_estimator"]]
    kind = given.get("loss_type", "dapo")
    if kind == "grpo":
        return ((loss * m).sum(1) / m.sum(1)).mean()
    return (loss * m).sum() / (8 * cases.LIMIT if kind == "dr_grpo" else m.sum())


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "two-sided": {"loss_type": "grpo", "delta": 1.35, "epsilon_high": 0.25},
    "gspo": {"importance_level": "sequence", "loss_type": "grpo", "epsilon_high": 0.1},
    "gspo over tokens": {"importance_level": "sequence"},
    "cispo": {"surrogate": "cispo", "epsilon_high": 0.3},
    "cispo of answers": {"surrogate": "cispo", "importance_level": "sequence"},
    **{f"kl {k}": {"kl_in": "loss", "kl_estimator": k, "loss_type": "grpo"} for k in ("k1", "k2", "k3", "k3_ratio")},
    "kl over tokens": {"kl_in": "loss", "kl_estimator": "k3"},
    "kl dr_grpo": {"kl_in": "loss", "kl_estimator": "k2", "loss_type": "dr_grpo"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient_are_trls(name: str) -> None:
    """Old log-probabilities are the sampler's, so that ratios leave the clip on both sides."""
    given = VARIANTS[name]
    algorithm = algorithm_of(old_logprobs="sampled", beta=0.3, **given)
    cast, _, batch = prepared(algorithm)
    loss = algorithm.loss(cast, batch)
    ours, theirs = cases.total(loss, batch), trl(cast, batch, given, torch.tensor(1.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    leaf = cast.said["policy"]
    mine = cases.gradient(loss, leaf, batch)
    other = torch.autograd.grad(theirs, leaf)[0]
    # One ratio for all tokens, and one advantage: summed over an answer, GSPO-token's gradient is the answer's.
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_the_clip_is_reached_on_both_sides_and_counted() -> None:
    algorithm = algorithm_of(old_logprobs="sampled", beta=0, epsilon=0.1, epsilon_high=0.3)
    cast, _, batch = prepared(algorithm)
    seen = algorithm.loss(cast, batch).metrics
    low = high = 0
    for b in range(8):
        for t in cases.cells(b):
            ratio = math.exp(float(cast.said["policy"][b, t].detach() - batch.logp_BT[b, t]))
            good = float(batch.advantage_BT[b, t]) > 0
            low += ratio < 0.9 and not good
            high += ratio > 1.3 and good
    assert low > 0
    assert high > 0
    assert float(seen["clip_ratio/low_mean"].total) == low
    assert float(seen["clip_ratio/high_mean"].total) == high
    assert float(seen["policy/clipfrac_avg"].total) == low + high


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_samples_of_another_policy_are_weighed_as_trl_does(mode: Any) -> None:
    """TRL's `vllm_importance_sampling_mode` with its cap; the weights carry no gradient."""
    given = {"loss_type": "grpo", "kl_in": "loss", "kl_estimator": "k2"}
    algorithm = algorithm_of(beta=0, importance_correction=mode, importance_cap=1.2, loss_type="grpo")
    cast, scored, batch = prepared(algorithm)
    change = torch.zeros_like(batch.logp_BT)
    for b in range(8):
        cells = list(cases.cells(b))
        part = (cast.said["policy"].detach() - scored.rollouts.logp_BT)[b, cells]
        change[b, cells] = part if mode.startswith("token") else part.sum()
    ratio = change.exp()
    weight = ratio.clamp(max=1.2) if mode.endswith("truncate") else torch.where(ratio > 1.2, 0.0, ratio)
    assert bool((ratio > 1.2).any())
    loss = algorithm.loss(cast, batch)
    theirs = trl(cast, batch, {**given, "kl_in": "reward"}, weight)
    torch.testing.assert_close(cases.total(loss, batch), theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        cases.gradient(loss, cast.said["policy"], batch),
        torch.autograd.grad(theirs, cast.said["policy"])[0],
        rtol=1e-10,
        atol=1e-12,
    )


# --- what a KL loss pulls towards -------------------------------------------------------------------------------------


def states_kl(cast: Any, likely_B: Tensor, backwards: bool) -> Tensor:
    """−∇ of Σ over visited states of KL(π‖π_ref) or KL(π_ref‖π), how often they are visited held fixed; by hand."""
    logits = cast.logits["policy"].detach()
    p, q = logits.softmax(-1), cast.logits["reference"].softmax(-1)
    visits = torch.zeros(cases.STATES, dtype=torch.float64)
    visits.index_add_(0, cases.STATE.flatten(), likely_B.detach().repeat_interleave(cases.DEPTH))
    if backwards:
        return visits[:, None] * (p - q)
    gap = (p / q).log()
    return visits[:, None] * p * (gap - (p * gap).sum(-1, keepdim=True))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_ratio"])
def test_expected_gradients_of_kl_losses(estimator: Any) -> None:
    """k1: none. k2, k3·ratio: KL(π‖π_ref) state by state, as k1 in a reward that looks no further. k3: backwards."""
    cast, likely_B, scored = cases.table()
    algorithm = Algorithm(num_generations=27, kl_in="loss", kl_estimator=estimator, beta=1, loss_type="dr_grpo")
    with torch.no_grad():
        batch = algorithm.prepare(cast, scored)  # type: ignore[arg-type]
    weighed = replace(
        batch, weight_BT=likely_B[:, None].expand_as(batch.logp_BT) * 27, advantage_BT=batch.advantage_BT * 0
    )
    found = cases.gradient(algorithm.loss(cast, weighed), cast.logits["policy"], weighed)  # type: ignore[arg-type]
    if estimator == "k1":
        assert float(found.abs().max()) < 1e-12
        return
    torch.testing.assert_close(found, states_kl(cast, likely_B, estimator == "k3"), rtol=1e-9, atol=1e-12)
    near = torch.zeros_like(batch.logp_BT)
    near[:, 1:] = (cases.table_logp(cast.logits["policy"]) - cases.table_logp(cast.logits["reference"])).detach()
    in_reward = replace(weighed, advantage_BT=-near)
    without = algorithm_of(beta=0, old_logprobs="sampled", loss_type="dr_grpo")
    theirs = cases.gradient(without.loss(cast, in_reward), cast.logits["policy"], in_reward)  # type: ignore[arg-type]
    assert torch.allclose(found, theirs, rtol=1e-9, atol=1e-12) == (estimator != "k3")


def test_a_kl_loss_is_warned_of_and_kl_in_the_reward_is_not() -> None:
    assert algorithm_of().warnings() == []
    assert algorithm_of(kl_in="loss", kl_estimator="k3", beta=0).warnings() == []
    for estimator, said in (("k1", "gradient 0 on average"), ("k3", "biased"), ("k2", "later ones")):
        (text,) = algorithm_of(kl_in="loss", kl_estimator=estimator).warnings()
        assert said in text
        assert "kl_in: reward" in text
        assert "β drifts" in text
    (text,) = algorithm_of(kl_in="loss", kl_estimator="k3", scale_rewards="none").warnings()
    assert "β drifts" not in text


# --- overlong answers, what is refused, laws --------------------------------------------------------------------------


def test_overlong_answers_lose_and_truncated_ones_are_not_trained_on() -> None:
    """A limit of 7 with a cache of 3: lengths 5, 6, 7 lose 1/3, 2/3, 1 of the score (DAPO, eq. 13)."""
    algorithm = algorithm_of(overlong_cache=3, beta=0, scale_rewards="none", mask_truncated_completions=True)
    cast, scored, batch = prepared(algorithm)
    lost = {5: 1 / 3, 6: 2 / 3, 7: 1.0}
    reward = [float(s) - lost.get(n, 0.0) for s, n in zip(scored.score_B, cases.LENGTHS, strict=True)]
    for b in range(8):
        trained = batch.action_BT[b].nonzero()[:, 0].tolist()
        assert trained == ([] if cases.LENGTHS[b] == cases.LIMIT else list(cases.cells(b)))
        expected = reward[b] - sum(reward[b // 4 * 4 :][:4]) / 4
        assert batch.advantage_BT[b, trained].tolist() == pytest.approx([expected] * len(trained), abs=1e-6)
    assert batch.counts()["tokens"] == sum(n for n in cases.LENGTHS if n < cases.LIMIT)
    found = cases.gradient(algorithm.loss(cast, batch), cast.said["policy"], batch)
    assert float(found[[1, 4]].abs().max()) == 0.0
    assert batch.metrics["objective/scores"] == pytest.approx(float(scored.score_B.mean())), "as the reward said"


def test_a_rollout_of_truncated_answers_alone_is_a_step_of_nothing() -> None:
    for kind in ("grpo", "dapo", "dr_grpo"):
        algorithm = algorithm_of(mask_truncated_completions=True, loss_type=kind)
        cast, scored = cases.told()
        cut = replace(scored, rollouts=replace(scored.rollouts, finished_B=torch.zeros(8).bool()))
        batch = algorithm.prepare(cast, cut)  # type: ignore[arg-type]
        loss = algorithm.loss(cast, batch)  # type: ignore[arg-type]
        assert cases.value(loss, replace(batch, action_BT=batch.action_BT | True)) == 0.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_generations": 1}, "1 answer a prompt has no siblings"),
        ({"kl_estimator": "k3"}, "k3 in the reward"),
        ({"delta": 1.1}, "delta 1.1 is not above"),
        ({"delta": 1.25, "epsilon_high": 0.3}, "is not above"),
        ({"importance_correction": "token_mask", "old_logprobs": "sampled"}, "Set old_logprobs: recomputed"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PalateError, match=said):
        build("algorithms", {"kind": "grpo", **given})


def test_a_cache_longer_than_the_answer_is_refused() -> None:
    with pytest.raises(PalateError, match="overlong_cache: 8 is more than the 7 tokens"):
        prepared(algorithm_of(overlong_cache=8))


LAWS = ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "kl k3_ratio"]


@pytest.mark.parametrize("name", LAWS)
def test_micro_batches_garbage_and_padding(name: str) -> None:
    more = {"mask_truncated_completions": True, "importance_correction": "token_truncate"} if name == "grpo" else {}
    cases.keeps_the_laws(algorithm_of(epsilon=0.05, **VARIANTS[name], **more))


def test_a_sabotaged_average_breaks_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dividing by the micro-batch's own tokens, the mistake of six trainers."""
    algorithm = algorithm_of()
    right = Algorithm.loss

    def wrong(self: Algorithm, cast: Any, batch: Any) -> Any:
        loss = right(self, cast, batch)
        own = 1.0 / float(batch.action_BT.sum())
        return replace(loss, terms={n: replace(t, total=t.total * own, per="rows") for n, t in loss.terms.items()})

    monkeypatch.setattr(Algorithm, "loss", wrong)
    with pytest.raises(AssertionError):
        cases.keeps_the_laws(algorithm)


def test_dense_rewards_are_the_scalar_bit_for_bit() -> None:
    cast, scored = cases.told()
    dense = torch.zeros(scored.token_reward_BT.shape, dtype=torch.float64)
    for b in range(8):
        dense[b, cases.cells(b)[-1]] = scored.score_B[b]
    other = replace(scored, score_B=scored.score_B * 0, token_reward_BT=dense)
    for more in ({}, {"overlong_cache": 3}, {"scale_rewards": "batch"}):
        ours, theirs = (algorithm_of(**more).prepare(cast, s) for s in (scored, other))  # type: ignore[arg-type]
        assert ours.advantage_BT.equal(theirs.advantage_BT)


def test_the_helper_refuses_nothing_it_should_not() -> None:
    assert _graded.require_siblings(2) == 2


# --- real runs --------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"num_iterations": 2, "num_mini_batches": 2},
    "published": {"kl_in": "loss", "kl_estimator": "k3", "loss_type": "grpo", "num_mini_batches": 2},
    "gspo": {"importance_level": "sequence", "loss_type": "grpo", "num_iterations": 2, "epsilon": 3e-4},
    "moving": {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "num_mini_batches": 2},
    "cispo": {"surrogate": "cispo", "beta": 0, "num_iterations": 2, "loss_type": "dr_grpo", "scale_rewards": "none"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_real_run_goes_on_where_it_was_stopped(name: str, tmp_path: Path) -> None:
    stage = cases.stage(tmp_path, {"kind": "grpo", "num_generations": 4, **RUNS[name]})
    rows = goes_on(tmp_path, Algorithm, stage, 3)
    assert all(row["first_minibatch/ratio_error"] < 1e-5 for row in rows)
    told = tmp_path / "stopped" / "1-ppo" / "warnings.jsonl"
    assert told.exists() == (name == "published")
    if name == "published":
        assert "algorithm: kl_estimator k3 as a loss is biased" in tiny_runs.warnings(told.parent)[0]


def test_the_reference_becomes_the_policy_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1's: after the copy the KL begins at 0 again, between copies the reference stays."""
    distance: list[float] = []
    after = Algorithm.after

    def measured(self: Algorithm, cast: Any, step: int) -> None:
        after(self, cast, step)
        policy, reference = (cast.seat(role).trunk.model for role in ("policy", "reference"))
        pairs = zip(policy.parameters(), reference.parameters(), strict=True)
        distance.append(max(float((a - b).detach().abs().max()) for a, b in pairs))

    monkeypatch.setattr(Algorithm, "after", measured)
    settings = {"kind": "grpo", "num_generations": 4, "num_mini_batches": 2, "ref_model_sync_steps": 3}
    tiny_runs.run(tmp_path, cases.stage(tmp_path, settings), name="moving")
    assert [d == 0 for d in distance] == [step % 3 == 0 for step in range(1, len(distance) + 1)]
    assert len(distance) >= 6


def test_a_reference_that_could_not_move_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with beta 0 there is no reference that could move"):
        Algorithm(beta=0, ref_model_sync_steps=3)
    stage = cases.stage(tmp_path, {"kind": "grpo", "num_generations": 4, "ref_model_sync_steps": 3})
    with pytest.raises(PalateError, match="the reference has no weights of its own that could follow"):
        tiny_runs.run(tmp_path, {**stage, "layout": {"kind": "adapters", "lora_rank": 2}}, name="worn")

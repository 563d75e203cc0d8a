"""Online DPO: pairs, labels and losses against loops, the exact optimum of a table, laws, a run that resumes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from palate import losses
from palate.algorithms import _pairs, online_dpo
from palate.algorithms.online_dpo import Algorithm
from palate.batches import Duels
from palate.check.recipe import check_recipe
from palate.metrics import lookup
from palate.settings import PalateError, build
from tests.algorithms import graded_cases as cases
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.stages import tiny_runs


def prepared(algorithm: Algorithm, cast: Any, scored: Any) -> Any:
    with torch.no_grad():
        return algorithm.prepare(cast, scored)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def matches(score: list[float], pairs: str) -> list[tuple[int, int]]:
    """Who meets, the better one first; eight answers to two prompts."""
    found = []
    for first in (0, 4):
        group = sorted(range(first, first + 4), key=lambda i: -score[i])
        found += list(itertools.combinations(group, 2)) if pairs == "all" else [(group[0], group[-1])]
    return found


def by_hand(cast: Any, scored: Any, how: Algorithm) -> float:
    """The mean over pairs of p · loss + (1 − p) · loss of the pair the other way round, for soft and hard labels."""
    score, logp, ref = (x.detach().numpy() for x in (scored.score_B, cast.said["policy"], cast.said["reference"]))

    def gain(i: int) -> float:
        found = sum(logp[i, t] - ref[i, t] for t in cases.cells(i))
        per_token = how.logp_reduce == "mean" or (how.logp_reduce == "auto" and how.loss_type == "ipo")
        return found / cases.LENGTHS[i] if per_token else found

    def loss(h: float) -> float:
        return (h - 1 / (2 * how.beta)) ** 2 if how.loss_type == "ipo" else -math.log(sigmoid(how.beta * h))

    total, met = 0.0, matches(score.tolist(), how.pairs)
    for i, j in met:
        p = 1.0 if how.label == "argmax" else sigmoid((score[i] - score[j]) / how.label_temperature)
        total += p * loss(gain(i) - gain(j)) + (1 - p) * loss(gain(j) - gain(i))
    return total / len(met)


VOWELS = "tests.stages.tiny_runs:vowels"
FORMS: list[dict[str, Any]] = [
    {},
    {"pairs": "all", "label_temperature": 0.5, "beta": 0.7},
    {"label": "argmax", "pairs": "all"},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "logp_reduce": "sum", "label": "argmax"},
    {"logp_reduce": "mean", "beta": 2.0},
]


def check_losses() -> None:
    for form in FORMS:
        algorithm = Algorithm(num_generations=4, **form)
        cast, scored = cases.told()
        batch = prepared(algorithm, cast, scored)
        found = cases.value(algorithm.loss(cast, batch), batch)  # type: ignore[arg-type]
        assert found == pytest.approx(by_hand(cast, scored, algorithm), rel=1e-12), form


def test_the_loss_against_loops() -> None:
    check_losses()


SABOTAGE: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "label_flipped": (_pairs, "expected", lambda a, b, p, f=_pairs.expected: f(b, a, p)),
    "label_ignored": (_pairs, "expected", lambda a, b, p: a),
    "certain_label_softened": (_pairs, "expected", lambda a, b, p, f=_pairs.expected: f(a, b, p.clamp(max=0.9))),
    "no_reference": (online_dpo, "_as_pairs", lambda b, f=online_dpo._as_pairs: replace(f(b), ref_logp_BKT=None)),
    "sigmoid_without_log": (losses, "dpo", lambda w, x, y, z, beta: -(beta * (w - x - y + z)).sigmoid()),
    "beta_dropped": (losses, "dpo", lambda *a, f=losses.dpo: f(*a[:4], 1.0)),
    "ipo_target_doubled": (losses, "ipo", lambda *a, f=losses.ipo: f(*a[:4], a[4] / 2)),
    "averages_swapped": (_pairs, "answers", lambda x, b, average, f=_pairs.answers: f(x, b, not average)),
    "mask_dropped": (
        _pairs,
        "answers",
        lambda x, b, average, f=_pairs.answers: f(x, replace(b, action_BKT=b.action_BKT | True), average),
    ),
    "neighbours_meet": (Algorithm, "_meetings", lambda self, r: torch.arange(len(r)).view(-1, 2)),
    "worst_first": (Algorithm, "_meetings", lambda self, r, f=Algorithm._meetings: f(self, -r)),
    "reward_unscaled": (
        Algorithm,
        "_judged",
        lambda self, p, r, k, f=Algorithm._judged: f(self.model_copy(update={"label_temperature": 1.0}), p, r, k),
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_sabotaged_twin_is_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, twin = SABOTAGE[name]
    monkeypatch.setattr(owner, attribute, twin)
    with pytest.raises(AssertionError):
        check_losses()


def test_labels_are_drawn_by_bradley_terry_and_by_a_counter() -> None:
    """How often each answer wins is σ(difference / temperature); the loss is on average that of soft labels."""
    algorithm = Algorithm(num_generations=4, pairs="all", label="sampled", label_temperature=0.8)
    cast, scored = cases.told()
    score = scored.score_B.tolist()
    wins: dict[tuple[int, int], int] = dict.fromkeys(matches(score, "all"), 0)
    values = []
    for counter in range(600):
        batch = prepared(algorithm, cast, replace(scored, key=counter))
        assert bool((batch.probability_B == 1).all())
        for i, j in batch.tokens_BKT[..., 0].tolist():
            wins[(i, j)] = wins.get((i, j), 0) + 1
        values.append(cases.value(algorithm.loss(cast, batch), batch))  # type: ignore[arg-type]
    for i, j in matches(score, "all"):
        likely = sigmoid((score[i] - score[j]) / 0.8)
        assert wins[(i, j)] / 600 == pytest.approx(likely, abs=4 * math.sqrt(likely * (1 - likely) / 600))
        assert wins[(i, j)] + wins.get((j, i), 0) == 600
    soft = Algorithm(num_generations=4, pairs="all", label_temperature=0.8)
    batch = prepared(soft, cast, scored)
    exact = cases.value(soft.loss(cast, batch), batch)  # type: ignore[arg-type]
    assert np.mean(values) == pytest.approx(exact, abs=4 * float(np.std(values)) / math.sqrt(600))
    again, other = (prepared(algorithm, cast, replace(scored, key=c)).tokens_BKT for c in (7, 8))
    assert again.equal(prepared(algorithm, cast, replace(scored, key=7)).tokens_BKT)
    assert not again.equal(other)


# --- the optimum of a table ------------------------------------------------------------------------------------------


def logits_of(logp_K: Tensor) -> Tensor:
    """Logits of every state of the table whose answers have these log-probabilities."""
    logits = torch.full((cases.STATES, cases.SYMBOLS), -math.inf, dtype=torch.float64)
    for answer, symbols in enumerate(cases.ANSWERS.tolist()):
        for state, symbol in zip(cases.STATE[answer].tolist(), symbols, strict=True):
            logits[state, symbol] = torch.logaddexp(logits[state, symbol], logp_K[answer])
    return logits


def slope_at_the_optimum(algorithm: Algorithm, beta: float) -> float:
    """The largest component of the gradient at π_ref · exp(r/β), beside the largest at the reference itself."""
    cast, _, scored = cases.table()
    ref_K = cases.table_logp(cast.logits["reference"]).sum(-1)
    found = []
    for logits in (logits_of((ref_K + scored.score_B / beta).log_softmax(-1)), cast.logits["reference"].clone()):
        cast.logits["policy"] = logits.requires_grad_()
        batch = prepared(algorithm, cast, scored)
        loss = algorithm.loss(cast, batch)  # type: ignore[arg-type]
        found.append(float(cases.gradient(loss, logits, batch).abs().max()))
    return found[0] / found[1]


def test_soft_labels_have_the_exact_optimum_and_hard_ones_have_not() -> None:
    every = {"num_generations": 27, "pairs": "all", "beta": 0.5}
    assert slope_at_the_optimum(Algorithm(**every), 0.5) < 1e-12
    assert slope_at_the_optimum(Algorithm(**every, label_temperature=2.0), 1.0) < 1e-12
    assert slope_at_the_optimum(Algorithm(**every, label_temperature=2.0), 0.5) > 1e-2
    assert slope_at_the_optimum(Algorithm(**every, label="argmax"), 0.5) > 1e-1
    assert slope_at_the_optimum(Algorithm(**every, loss_type="ipo", logp_reduce="sum"), 0.5) > 1e-2


def test_hard_labels_are_warned_of() -> None:
    assert Algorithm().warnings() == Algorithm(label="sampled").warnings() == []
    (text,) = Algorithm(label="argmax").warnings()
    assert "infinite scale of reward" in text


# --- what is met, and what is said of it -----------------------------------------------------------------------------


def test_ties_and_identical_answers_are_counted_and_teach_nothing_wrong() -> None:
    cast, scored = cases.told()
    scored = replace(scored, score_B=torch.full_like(scored.score_B, 0.3))
    for label in ("soft", "argmax"):
        batch = prepared(Algorithm(num_generations=4, label=label), cast, scored)  # type: ignore[arg-type]
        assert batch.tokens_BKT[..., 0].tolist() == [[0, 3], [4, 7]], "an answer never meets itself"
        assert batch.probability_B.tolist() == [0.5, 0.5]
        assert batch.metrics["duels/ties"] == 1.0
        assert batch.metrics["duels/identical"] == 0.0
    rows = scored.rollouts
    rows = replace(rows, tokens_BT=rows.tokens_BT * 0 + rows.real_BT, real_BT=rows.real_BT[[0, 1, 2, 0, 4, 5, 6, 7]])
    batch = prepared(Algorithm(num_generations=4), cast, replace(scored, rollouts=rows))
    assert batch.metrics["duels/identical"] == 0.5
    assert batch.metrics["duels/ties"] == 1.0


def test_rollout_metrics_speak_of_all_answers_and_the_score_counts_dense_rewards() -> None:
    cast, scored = cases.told()
    batch = prepared(Algorithm(num_generations=4, beta=0.5), cast, scored)
    gap = (scored.rollouts.logp_BT - cast.said["reference"].detach()).numpy()
    kl = np.mean([gap[b, list(cases.cells(b))].sum() for b in range(8)])
    assert batch.metrics["objective/kl"] == pytest.approx(kl)
    assert batch.metrics["objective/rlhf_reward"] == pytest.approx(float(scored.score_B.mean()) - 0.5 * kl)
    score = scored.score_B.tolist()
    margin = np.mean([score[i] - score[j] for i, j in matches(score, "best_worst")])
    assert batch.metrics["objective/scores_margin"] == pytest.approx(margin)
    dense = torch.zeros(scored.token_reward_BT.shape, dtype=torch.float64)
    for b in range(8):
        dense[b, cases.cells(b)[-1]] = score[b]
    other = prepared(
        Algorithm(num_generations=4), cast, replace(scored, score_B=scored.score_B * 0, token_reward_BT=dense)
    )
    assert other.tokens_BKT.equal(batch.tokens_BKT)
    assert other.probability_B.equal(batch.probability_B)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_generations": 1}, "no siblings"),
        ({"label": "hard"}, "'soft', 'sampled' or 'argmax'"),
        ({"loss_type": "hinge"}, "'sigmoid' or 'ipo'"),
        ({"label_temperature": 0}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PalateError, match=said):
        build("algorithms", {"kind": "online_dpo", **given})


# --- laws ------------------------------------------------------------------------------------------------------------


def spoiled(batch: Duels) -> Duels:
    """nan in every float cell off the mask, other tokens under the padding, more padding."""
    nan, real = torch.tensor(float("nan")), batch.real_BKT
    tokens_BKT = torch.where(real, batch.tokens_BKT, torch.full_like(batch.tokens_BKT, 17))
    ref = torch.where(batch.action_BKT, batch.ref_logp_BKT, nan)
    wide: Any = law.widened(replace(batch, tokens_BKT=tokens_BKT, ref_logp_BKT=ref))
    return wide


@pytest.mark.parametrize("form", FORMS[:4:3])
def test_micro_batches_garbage_and_padding(form: dict[str, Any]) -> None:
    algorithm = Algorithm(num_generations=4, pairs="all", **form)
    cast, batch = cases.real(algorithm)
    whole = law.gradients(cast, batch, algorithm, batch.size)
    assert any(g.abs().max() > 0 for g in whole.values())
    for most in (1, 5, *law.BY_TOKENS):
        assert law.distance(whole, law.gradients(cast, batch, algorithm, most)) < 1e-6
    assert law.distance(whole, law.gradients(cast, spoiled(batch), algorithm, 5)) < 1e-6  # type: ignore[arg-type]


def test_a_pair_is_one_forward_pass() -> None:
    cast, scored = cases.told()
    algorithm = Algorithm(num_generations=4)
    batch = prepared(algorithm, cast, scored)
    assert cast.asked == ["reference"]
    algorithm.loss(cast, batch)  # type: ignore[arg-type]
    assert cast.asked == ["reference", "policy"]


# --- real runs -------------------------------------------------------------------------------------------------------


def test_a_real_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Eight answers make two pairs for four minibatches, so that two of each pass are empty."""
    given = {"kind": "online_dpo", "label": "sampled", "num_generations": 4, "num_iterations": 2}
    stage = cases.stage(tmp_path, {**given, "num_mini_batches": 4})
    rows = goes_on(tmp_path, Algorithm, stage, 2)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["objective/kl"] != 0
    assert "first_minibatch/ratio_error" not in rows[0]
    assert all(lookup(name) is not None for name in rows[0] if name != "step")
    metrics = tiny_runs.run(
        tmp_path,
        cases.stage(tmp_path, {**given, "loss_type": "ipo", "num_iterations": 1}, layout={"kind": "adapters"}),
        name="lora",
    )
    first = tiny_runs.lines(metrics / "1-ppo" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(1 / (4 * 0.1**2), rel=1e-3), "IPO before the first step"


def test_the_first_step_starts_at_ln_2(tmp_path: Path) -> None:
    given = {"kind": "online_dpo", "label": "argmax"}
    done = tiny_runs.run(tmp_path, cases.stage(tmp_path, given, total_episodes=8))
    (row,) = tiny_runs.lines(done / "1-ppo" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert "algorithm: label argmax" in tiny_runs.warnings(done / "1-ppo")[0]


def test_palate_check_sets_it_up(tmp_path: Path) -> None:
    stage = {**cases.stage(tmp_path, {"kind": "online_dpo"}), "reward": {"kind": "function", "function": VOWELS}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "small", "output_dir": str(tmp_path / "runs"), "stages": [stage]}))
    (found,) = check_recipe(recipe, [], True, lambda text: None).stages
    assert found.seen.faults == ()
    assert found.seen.memory is not None
    assert found.seen.time is not None


def test_the_policy_learns_what_is_preferred(tmp_path: Path) -> None:
    given = {"kind": "online_dpo", "num_mini_batches": 2, "beta": 0.1, "label_temperature": 0.1}
    stage = cases.stage(tmp_path, given, rollout_batch_size=32, microbatch_size=32, total_episodes=640)
    done = tiny_runs.run(tmp_path, {**stage, "optimiser": {"learning_rate": 3e-3, "schedule": "constant"}})
    scores = [row["objective/scores"] for row in tiny_runs.lines(done / "1-ppo" / "metrics.jsonl")]
    assert np.mean(scores[-4:]) > np.mean(scores[:4]) + 0.1

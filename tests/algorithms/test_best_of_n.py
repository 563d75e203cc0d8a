"""Best of n and RFT: who is kept, golden; what is learnt from them, pass by pass; runs that resume and learn."""

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

from palate import credit
from palate.algorithms import best_of_n
from palate.algorithms.best_of_n import Algorithm
from palate.batches import Chosen, Rollouts, Scored
from palate.check.recipe import check_recipe
from palate.metrics import lookup
from palate.settings import PalateError, build
from palate.stages import online
from palate.step import minibatches
from tests.algorithms import graded_cases as cases
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.losses.golden import part_of
from tests.stages import tiny_runs

START = 1


def answers(*texts: str, prompts: int = 1) -> Rollouts:
    """Answers spelled in letters behind one prompt token each, the same number to each prompt; garbage off the mask."""
    width = START + max(len(text) for text in texts)
    tokens_BT = torch.full((len(texts), width), 99)
    action_BT = torch.zeros(tokens_BT.shape).bool()
    owner_B = torch.arange(len(texts)) // (len(texts) // prompts)
    for row, text in enumerate(texts):
        tokens_BT[row, 0] = 3 + owner_B[row]
        tokens_BT[row, START : START + len(text)] = torch.tensor([ord(c) for c in text])
        action_BT[row, START : START + len(text)] = True
    real_BT = action_BT.clone()
    real_BT[:, 0] = True
    logp_BT = torch.where(action_BT, -1.0, -77.0).double()
    return Rollouts(tokens_BT, real_BT, action_BT, logp_BT, owner_B > -1, owner_B, 0, 0.8, width)


def scored(rollouts: Rollouts, *scores: float) -> Scored:
    score_B = torch.tensor(scores, dtype=torch.float64)
    return Scored(rollouts, score_B, torch.zeros(rollouts.logp_BT.shape, dtype=torch.float64), {}, {})


def said(batch: Chosen) -> list[str]:
    return [
        "".join(chr(t) for t in row[mask].tolist()) for row, mask in zip(batch.tokens_BT, batch.action_BT, strict=True)
    ]


def prepared(algorithm: Algorithm, given: Scored) -> Any:
    return algorithm.prepare(None, given)  # type: ignore[arg-type]  # nobody speaks unless the KL is watched


# --- who is kept -----------------------------------------------------------------------------------------------------


def check_golden() -> None:
    """The schedule reaches its end, and no prompt's bar knows of another prompt's."""
    case = part_of("rft")
    expected, n = case["expected"], case["n_improve_steps"]
    p0, p1 = case["scores"]["p0"], case["scores"]["p1"]
    texts = "abcde", "fghij"
    given = scored(answers(*texts[0], *texts[1], prompts=2), *p0, *p1)
    how = {"start_quantile": case["start"], "end_quantile": case["end"], "n_improve_steps": n}
    algorithm = Algorithm(num_generations=5, select="quantile", **how)
    bars = credit.quantile_steps(case["start"], case["end"], n)
    assert bars == pytest.approx(expected["percentiles_reaching_end"], abs=1e-12)
    assert bars != pytest.approx(expected["percentiles_trlx"], abs=1e-3)
    batch = prepared(algorithm, given)
    assert algorithm.passes == n
    for number, bar in enumerate(expected["percentiles_reaching_end"]):
        kept = said(algorithm.of_pass(batch, number))
        for text, score in zip(texts, (p0, p1), strict=True):
            threshold = np.quantile(score, bar)
            mine = [c for c, r in zip(text, score, strict=True) if r >= threshold]
            assert [c for c in kept if c in text] == mine
    first = said(algorithm.of_pass(batch, 0))
    assert np.quantile(p0, 0.7) == pytest.approx(expected["quantile_0p7"]["p0"])
    assert sum(c in texts[0] for c in first) == expected["kept_at_0p7_unclipped"]["p0"]
    assert sum(c in texts[1] for c in first) == expected["kept_at_0p7_unclipped"]["p1"]
    assert sum(c in texts[1] for c in first) != expected["trlx_kept_at_0p7_after_clip"]["p1"]


def check_choice() -> None:
    """One best answer a prompt, copies out, later steps narrower, whole answers and nothing else trained."""
    best = prepared(Algorithm(num_generations=3), scored(answers(*"abcdef", prompts=2), 1, 3, 2, 5, 5, 4))
    assert said(best) == ["b", "d"], "the first of equals"
    assert best.steps_B.tolist() == [1, 1]
    assert best.metrics["kept/scores"] == 4.0
    assert best.metrics["kept/share"] == best.metrics["kept/share_last"] == pytest.approx(1 / 3)
    algorithm = Algorithm(num_generations=6, select="quantile", start_quantile=0.0, end_quantile=1.0, n_improve_steps=3)
    batch = prepared(algorithm, scored(answers("it", "it", "no", "it", "so", "a"), 1, 7, 2, 3, 4, 5))
    assert said(batch) == ["it", "no", "so", "a"], "copies out"
    assert batch.steps_B.tolist() == [3, 1, 2, 2], "of copies the best scored"
    assert [said(algorithm.of_pass(batch, n)) for n in range(3)] == [["it", "no", "so", "a"], ["it", "so", "a"], ["it"]]
    assert batch.metrics["kept/share"] == pytest.approx(4 / 6)
    assert batch.metrics["kept/share_last"] == pytest.approx(1 / 6)
    twice = Algorithm(num_generations=6, select="quantile", start_quantile=0, n_improve_steps=2, num_epochs=2)
    assert twice.passes == 4
    batch = prepared(twice, scored(answers(*"abcdef"), 1, 2, 3, 4, 5, 6))
    assert [len(said(twice.of_pass(batch, n))) for n in range(4)] == [6, 6, 1, 1]
    other = prepared(algorithm, scored(answers(*"aaabbb", *"aaabbb", prompts=2), *range(12)))
    assert said(other) == ["a", "b"] * 2, "the same text to another prompt is no copy"


def check_loss() -> None:
    """−log p per token, or the mean over answers of their mean; at the rollout's temperature; no prompt, no padding."""
    cast, given = cases.told()
    logp = cast.said["policy"].detach()
    for average in ("token", "sequence"):
        algorithm = Algorithm(num_generations=4, average=average)  # type: ignore[arg-type]
        batch = prepared(algorithm, given)
        rows = [int(row) for row in batch.tokens_BT[:, 0]]
        assert rows == [max(range(g, g + 4), key=lambda i: float(given.score_B[i])) for g in (0, 4)]
        nll = [[-float(logp[b, t]) for t in cases.cells(b)] for b in rows]
        flat = list(itertools.chain(*nll))
        expected = sum(flat) / len(flat) if average == "token" else np.mean([np.mean(one) for one in nll])
        assert cases.value(algorithm.loss(cast, batch), batch) == pytest.approx(expected, rel=1e-12)  # type: ignore[arg-type]


CHECKS = {"golden": check_golden, "choice": check_choice, "loss": check_loss}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_what_is_kept_and_learnt(check: Callable[[], None]) -> None:
    check()


def never_there(start: float, end: float, steps: int) -> list[float]:
    return [start + (end - start) / steps * i for i in range(steps)]


def clipped(score: Tensor, group: int, quantile: float) -> Tensor:
    bar = score.view(-1, group).quantile(quantile, -1)
    return score >= bar.clamp(bar.min() + 1e-3, bar.max() - 1e-3).repeat_interleave(group)


def everywhere(batch: Chosen) -> Tensor:
    return batch.action_BT | True


SABOTAGE: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "end_never_reached": (credit, "quantile_steps", never_there, "golden"),
    "bars_clipped_across_prompts": (credit, "reaches_quantile", clipped, "golden"),
    "one_bar_for_all_prompts": (
        credit,
        "reaches_quantile",
        lambda r, group, q, f=credit.reaches_quantile: f(r, len(r), q),
        "golden",
    ),
    "worst_kept": (
        Algorithm,
        "_steps",
        lambda self, earned, rows, f=Algorithm._steps: f(self, -earned, rows),
        "choice",
    ),
    "copies_kept": (best_of_n, "_without_copies", lambda steps, rows: steps, "choice"),
    "first_copy_kept": (
        best_of_n,
        "_without_copies",
        lambda steps, rows, f=best_of_n._without_copies: f(torch.ones_like(steps), rows) * steps,
        "choice",
    ),
    "every_pass_alike": (Algorithm, "of_pass", lambda self, batch, number: batch, "choice"),
    "epochs_ignored": (
        Algorithm,
        "of_pass",
        lambda self, batch, number, f=Algorithm.of_pass: f(self.model_copy(update={"num_epochs": 1}), batch, number),
        "choice",
    ),
    "mask_dropped": (best_of_n, "cross_entropy", lambda logp, mask: -logp, "loss"),
    "sign_flipped": (best_of_n, "cross_entropy", lambda logp, mask: logp.masked_fill(~mask, 0), "loss"),
    "sequence_summed": (
        best_of_n,
        "cross_entropy",
        lambda logp, mask: -logp.masked_fill(~mask, 0) * mask.sum(-1, keepdim=True),
        "loss",
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_sabotaged_twin_is_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, twin, check = SABOTAGE[name]
    monkeypatch.setattr(owner, attribute, twin)
    with pytest.raises(AssertionError):
        CHECKS[check]()


def test_dense_rewards_count_as_the_score() -> None:
    given = scored(answers(*"abc"), 1, 3, 2)
    dense = torch.zeros_like(given.token_reward_BT)
    dense[:, START] = given.score_B
    assert said(
        prepared(Algorithm(num_generations=3), replace(given, score_B=given.score_B * 0, token_reward_BT=dense))
    ) == ["b"]


def test_equal_scores_still_keep_one_answer_a_prompt() -> None:
    for how in ({}, {"select": "quantile"}):
        algorithm = Algorithm(num_generations=3, **how)  # type: ignore[arg-type]
        batch = prepared(algorithm, scored(answers(*"abbcde", prompts=2), *[0.1 + 0.2] * 6))
        for number in range(algorithm.passes):
            kept = said(algorithm.of_pass(batch, number))
            assert kept == (["a", "b", "c", "d", "e"] if how else ["a", "c"])


def test_its_expected_gradient_is_that_of_the_law_of_best_of_n() -> None:
    """π_n(y) = P(best)ⁿ − P(below)ⁿ: every pair of answers a table can give, weighed by how likely it is drawn."""
    cast, likely_K, every = cases.table()
    score_K, rows = every.score_B, every.rollouts
    pair_RK = torch.cartesian_prod(torch.arange(27), torch.arange(27))
    met = replace(every, rollouts=rows.select(pair_RK.flatten()), score_B=score_K[pair_RK.flatten()])
    dense = torch.zeros(met.rollouts.logp_BT.shape, dtype=torch.float64)
    algorithm = Algorithm(num_generations=2)
    batch = prepared(algorithm, replace(met, token_reward_BT=dense))
    weight_R = (likely_K[pair_RK[:, 0]] * likely_K[pair_RK[:, 1]]).detach()
    law_K = torch.zeros(27, dtype=torch.float64).index_add(0, batch.tokens_BT[:, 0], weight_R)
    order = score_K.argsort()
    up_to = likely_K.detach()[order].cumsum(0)
    exact = torch.zeros(27, dtype=torch.float64)
    exact[order] = up_to**2 - torch.cat([torch.zeros(1), up_to[:-1]]) ** 2
    torch.testing.assert_close(law_K, exact, rtol=1e-12, atol=1e-15)
    logits = cast.logits["policy"]
    each_K = cases.table_logp(logits).sum(-1)
    expected = torch.autograd.grad(-(exact * each_K).sum(), logits)[0]
    slopes = torch.zeros_like(expected)
    for part, weight in zip(batch.split(1), weight_R, strict=True):
        loss = algorithm.loss(cast, part)  # type: ignore[arg-type]
        slopes += torch.autograd.grad(loss.terms["loss"].total, logits)[0] * weight
    torch.testing.assert_close(slopes, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_generations": 1}, "no siblings"),
        (
            {"select": "quantile", "start_quantile": 0.9, "end_quantile": 0.5},
            "start_quantile 0.9 is above end_quantile",
        ),
        ({"n_improve_steps": 3}, "Set select: quantile"),
        ({"select": "top"}, "'best' or 'quantile'"),
        ({"select": "quantile", "end_quantile": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(PalateError, match=told):
        build("algorithms", {"kind": "best_of_n", **given})


# --- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_micro_batches_garbage_and_padding(average: Any) -> None:
    algorithm = Algorithm(num_generations=4, select="quantile", start_quantile=0.0, average=average)
    cast, batch = cases.real(algorithm, ("policy",))
    whole = law.gradients(cast, batch, algorithm, batch.size)
    assert any(g.abs().max() > 0 for g in whole.values())
    for size in (1, 3):
        assert law.distance(whole, law.gradients(cast, batch, algorithm, size)) < 1e-6
    other = replace(batch, tokens_BT=torch.where(batch.real_BT, batch.tokens_BT, torch.full_like(batch.tokens_BT, 17)))
    assert law.distance(whole, law.gradients(cast, law.widened(other), algorithm, 3)) < 1e-6


def test_a_pass_has_always_the_same_number_of_minibatches() -> None:
    """Kept rows need not be divisible: sizes differ by one at most, and position in a pass stays a place in it."""
    rows = answers(*"abcdefg")
    for parts in (2, 3, 5, 9):
        found = list(minibatches(rows, parts, 1, "pass"))
        sizes = [part.size for part in found]
        assert len(found) == parts
        assert max(sizes) - min(sizes) <= 1
        assert sorted(int(i) for part in found for i in part.tokens_BT[:, START]) == [ord(c) for c in "abcdefg"]


# --- real runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop", "episodes"), [(3, 48), (15, 128)])
def test_a_real_run_goes_on_where_it_was_stopped(stop: int, episodes: int, tmp_path: Path) -> None:
    """Two to six answers are kept, for four minibatches a pass: step 15 is followed by an empty one."""
    given = {"kind": "best_of_n", "num_generations": 4, "select": "quantile", "n_improve_steps": 2}
    given |= {"start_quantile": 0.6, "num_mini_batches": 4, "watch_kl": True}
    rows = goes_on(tmp_path, Algorithm, cases.stage(tmp_path, given, total_episodes=episodes), stop)
    assert rows[1]["kept/share_last"] < 4 / 8
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["objective/kl"] != 0
    assert all(lookup(name) is not None for name in rows[0] if name != "step")


def test_a_run_learns_and_holds_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[set[str]] = []
    whole = online._seats.online_cast  # pyright: ignore[reportPrivateUsage]

    def watched(*args: Any) -> Any:
        cast = whole(*args)
        held.append(set(cast.roles))
        return cast

    monkeypatch.setattr(online._seats, "online_cast", watched)  # pyright: ignore[reportPrivateUsage]
    given = {"kind": "best_of_n", "num_generations": 8, "num_mini_batches": 2, "num_epochs": 2}
    stage = cases.stage(tmp_path, given, rollout_batch_size=64, microbatch_size=32, total_episodes=640)
    done = tiny_runs.run(tmp_path, {**stage, "optimiser": {"learning_rate": 3e-3, "schedule": "constant"}})
    rows = tiny_runs.lines(done / "1-ppo" / "metrics.jsonl")
    assert held == [{"policy"}]
    assert "objective/kl" not in rows[0]
    assert all(row["kept/share"] == 1 / 8 for row in rows)
    assert all(row["kept/scores"] > row["objective/scores"] for row in rows)
    scores = [row["objective/scores"] for row in rows]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.1
    assert math.isfinite(rows[-1]["loss"])


def test_palate_check_sets_it_up(tmp_path: Path) -> None:
    reward = {"kind": "function", "function": "tests.stages.tiny_runs:vowels"}
    stage = {**cases.stage(tmp_path, {"kind": "best_of_n", "num_generations": 4}), "reward": reward}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "small", "output_dir": str(tmp_path / "runs"), "stages": [stage]}))
    (found,) = check_recipe(recipe, [], True, lambda text: None).stages
    assert found.seen.faults == ()
    assert found.seen.memory is not None
    assert found.seen.time is not None
    assert found.seen.time.basis.startswith("8 answers"), "all that are written, not those that are kept"

"""REINFORCE++, its baseline form and ReMax: rewards to go, normalisation, the greedy score, runs that resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palate.algorithms import ppo
from palate.algorithms.reinforce import Algorithm
from palate.batches import Tokens
from palate.settings import PalateError, build
from tests.algorithms import graded_cases as cases
from tests.algorithms.resuming import goes_on
from tests.stages import tiny_runs

BETA = 0.15


def prepared(algorithm: Algorithm, **changes: Any) -> Any:
    cast, scored = cases.told()
    scored = replace(scored, **changes)
    with torch.no_grad():
        return cast, scored, algorithm.prepare(cast, scored)  # type: ignore[arg-type]


def to_go_by_hand(cast: Any, score: list[float], gamma: float, dense: Any = None) -> list[list[float]]:
    """For each token the sum of what is still to come: −β·KL of every token, the score on the last."""
    gap = (cast.said["policy"] - cast.said["reference"]).detach().numpy()
    found = []
    for b in range(8):
        cells = list(cases.cells(b))
        reward = [-BETA * gap[b, t] + (0.0 if dense is None else float(dense[b, t])) for t in cells]
        reward[-1] += score[b]
        found.append([sum(gamma ** (k - i) * reward[k] for k in range(i, len(cells))) for i in range(len(cells))])
    return found


def whitened(rows: list[list[float]]) -> list[list[float]]:
    flat = np.concatenate([np.array(r) for r in rows])
    return [[(x - flat.mean()) / math.sqrt(flat.var() + 1e-8) for x in row] for row in rows]


def same(batch: Any, expected: list[list[float]]) -> None:
    for b in range(8):
        assert batch.advantage_BT[b, list(cases.cells(b))].tolist() == pytest.approx(expected[b], abs=1e-9)
        outside = [t for t in range(batch.advantage_BT.shape[1]) if t not in cases.cells(b)]
        assert float(batch.advantage_BT[b, outside].abs().sum()) == 0.0


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("whiten", [True, False])
def test_reinforce_plus_plus(gamma: float, whiten: bool) -> None:
    cast, scored, batch = prepared(Algorithm(kl_coef=BETA, gamma=gamma, whiten_advantages=whiten))
    raw = to_go_by_hand(cast, scored.score_B.tolist(), gamma)
    same(batch, whitened(raw) if whiten else raw)


def test_the_baseline_form_takes_the_groups_mean_off_first_and_normalises_then() -> None:
    cast, scored, batch = prepared(Algorithm(baseline="group", num_generations=4, kl_coef=BETA))
    score = scored.score_B.tolist()
    above = [score[b] - sum(score[b // 4 * 4 : b // 4 * 4 + 4]) / 4 for b in range(8)]
    same(batch, whitened(to_go_by_hand(cast, above, 1.0)))


def test_remax_takes_the_greedy_answers_score_off() -> None:
    greedy = cases.random(8, seed=77)
    algorithm = Algorithm(baseline="greedy", whiten_advantages=False, kl_coef=BETA)
    assert algorithm.greedy_baseline
    assert not Algorithm().greedy_baseline
    cast, scored, batch = prepared(algorithm, baseline_B=greedy)
    same(batch, to_go_by_hand(cast, (scored.score_B - greedy).tolist(), 1.0))
    with pytest.raises(PalateError, match="nobody scored"):
        prepared(algorithm)


def test_rewards_per_token_count_from_their_token_on() -> None:
    cast, scored = cases.told()
    dense = torch.where(scored.rollouts.action_BT, cases.random(8, 10, seed=5), -55.0)
    cast, scored, batch = prepared(Algorithm(kl_coef=BETA, whiten_advantages=False), token_reward_BT=dense)
    same(batch, to_go_by_hand(cast, scored.score_B.tolist(), 1.0, dense))
    earned = [float(scored.score_B[b]) + sum(float(dense[b, t]) for t in cases.cells(b)) for b in range(8)]
    assert batch.metrics["objective/scores"] == pytest.approx(np.mean(earned))


@pytest.mark.parametrize("given", [{}, {"baseline": "group", "num_generations": 4}, {"baseline": "greedy"}])
def test_dense_rewards_are_the_scalar_bit_for_bit(given: dict[str, Any]) -> None:
    cast, scored = cases.told()
    scored = replace(scored, baseline_B=cases.random(8, seed=1) * 0)
    dense = torch.zeros(scored.token_reward_BT.shape, dtype=torch.float64)
    for b in range(8):
        dense[b, cases.cells(b)[-1]] = scored.score_B[b]
    other = replace(scored, score_B=scored.score_B * 0, token_reward_BT=dense)
    ours, theirs = (Algorithm(**given).prepare(cast, s) for s in (scored, other))  # type: ignore[arg-type]
    assert ours.advantage_BT.equal(theirs.advantage_BT)


def test_ppos_dense_rewards_are_the_scalar_bit_for_bit() -> None:
    """The same for the method with a critic, whose reward is made of the same parts."""

    class WithValues(cases.Told):
        def values(self, role: str, batch: Tokens) -> torch.Tensor:
            return cases.random(8, batch.tokens_BT.shape[1] + 1, seed=2)[batch.tokens_BT[:, 0]][:, :-1]

    told, scored = cases.told()
    cast = WithValues(**told.said)
    dense = torch.zeros(scored.token_reward_BT.shape, dtype=torch.float64)
    for b in range(8):
        dense[b, cases.cells(b)[-1]] = scored.score_B[b]
    other = replace(scored, score_B=scored.score_B * 0, token_reward_BT=dense)
    for more in ({}, {"whiten_rewards": True}):
        ours, theirs = (ppo.Algorithm(**more).prepare(cast, s) for s in (scored, other))  # type: ignore[arg-type]
        assert ours.advantage_BT.equal(theirs.advantage_BT)
        assert ours.returns_BT.equal(theirs.returns_BT)


def test_the_loss_against_loops() -> None:
    algorithm = Algorithm(cliprange=0.1, importance_correction="token_truncate", importance_cap=1.1)
    cast, scored, batch = prepared(algorithm)
    batch = replace(batch, logp_BT=scored.rollouts.logp_BT)  # as if steps had been taken since
    loss = algorithm.loss(cast, batch)
    expected, tokens = 0.0, sum(cases.LENGTHS)
    for b in range(8):
        for t in cases.cells(b):
            ratio = math.exp(float(cast.said["policy"][b, t].detach() - batch.logp_BT[b, t]))
            advantage, weight = float(batch.advantage_BT[b, t]), min(ratio, 1.1)
            expected += weight * max(-advantage * ratio, -advantage * min(max(ratio, 0.9), 1.1)) / tokens
    assert cases.value(loss, batch) == pytest.approx(expected, rel=1e-12)


def test_the_expected_gradient_is_that_of_score_minus_beta_kl() -> None:
    """KL of later tokens in the reward to go, none of the earlier ones: still the exact gradient."""
    cast, likely_B, scored = cases.table()
    algorithm = Algorithm(kl_coef=0.3, whiten_advantages=False)
    batch = algorithm.prepare(cast, scored)  # type: ignore[arg-type]
    weighed = replace(batch, weight_BT=likely_B[:, None].expand_as(batch.logp_BT) * 27 * cases.DEPTH)
    found = cases.gradient(algorithm.loss(cast, weighed), cast.logits["policy"], weighed)  # type: ignore[arg-type]
    logp, ref = (cases.table_logp(cast.logits[r]).sum(-1) for r in ("policy", "reference"))
    value = (logp.exp() * (scored.score_B - 0.3 * (logp - ref))).sum()
    exact = -torch.autograd.grad(value, cast.logits["policy"])[0]
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_equal_scores_and_no_kl_push_nowhere() -> None:
    for given in ({}, {"baseline": "group", "num_generations": 4}):
        algorithm = Algorithm(kl_coef=0, **given)
        cast, _, batch = prepared(algorithm, score_B=torch.full((8,), 1 / 3, dtype=torch.float64))
        found = cases.gradient(algorithm.loss(cast, batch), cast.said["policy"], batch)
        assert float(found.abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"baseline": "group"}, "1 answer a prompt has no siblings"),
        ({"old_logprobs": "sampled", "importance_correction": "token_mask"}, "Set old_logprobs: recomputed"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PalateError, match=said):
        build("algorithms", {"kind": "reinforce", **given})


@pytest.mark.parametrize("given", [{"importance_correction": "sequence_mask"}, {"baseline": "greedy"}])
def test_micro_batches_garbage_and_padding(given: dict[str, Any]) -> None:
    cases.keeps_the_laws(Algorithm(cliprange=0.05, **given))


RUNS: dict[str, dict[str, Any]] = {
    "none": {"num_iterations": 2, "num_mini_batches": 2},
    "group": {"baseline": "group", "num_generations": 4, "num_mini_batches": 2},
    "greedy": {"baseline": "greedy", "whiten_advantages": False, "num_mini_batches": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_real_run_goes_on_where_it_was_stopped(name: str, tmp_path: Path) -> None:
    rows = goes_on(tmp_path, Algorithm, cases.stage(tmp_path, {"kind": "reinforce", **RUNS[name]}), 3)
    assert all(row["first_minibatch/ratio_error"] < 1e-5 for row in rows)
    assert ("objective/greedy_scores" in rows[0]) == (name == "greedy")


def test_the_greedy_baseline_is_the_score_of_the_likeliest_answer(tmp_path: Path) -> None:
    """Asked of a real stage: without KL each token's advantage is the answer's score minus that of the greedy one."""
    given = {"kind": "reinforce", "baseline": "greedy", "num_generations": 2, "whiten_advantages": False, "kl_coef": 0}
    loop = tiny_runs.online_loop(tmp_path / "stage", cases.stage(tmp_path, given, watch=_watch))
    lesson = loop._collect(1)  # pyright: ignore[reportPrivateUsage]
    batch: Any = lesson.experience
    prompts = [loop.prompts[i].tokens for i in loop.order.batch(0)]
    best = loop.engine.generate(prompts, range(4), greedy=True)
    tokenizer = loop.loaded.tokenizer

    def worth(rows: Any) -> list[float]:
        said = [tokenizer.decode(t[m].tolist()) for t, m in zip(rows.tokens_BT, rows.action_BT, strict=True)]
        return tiny_runs.vowels([], said)

    greedy = worth(best)
    expected = [score - greedy[row // 2] for row, score in enumerate(worth(batch))]
    assert [float(batch.advantage_BT[b][batch.action_BT[b]][0]) for b in range(8)] == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) > 2
    assert lesson.seen["objective/greedy_scores"] == pytest.approx(sum(greedy) / 4)
    assert _asked == [8], "who only watches is not asked about greedy answers"


_asked: list[int] = []


def _watch(prompts: list[str], completions: list[str]) -> list[float]:
    _asked.append(len(completions))
    return [0.0] * len(completions)

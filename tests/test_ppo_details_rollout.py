"""The published details of PPO through the library's own door: from sampled answers to what is learnt.

The golden cases again, but by `Judging` and `ppo.Algorithm.prepare` instead of formula by formula, with a cast that
says the golden numbers; and what a real, tiny cast must do before its first step. Details as in docs/ppo_details.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from palate import credit
from palate.algorithms import ppo
from palate.batches import Experience, Rollouts, Scored, Tokens
from palate.cast import Cast, Layout, assemble
from palate.cutting import Microbatch
from palate.data.encode import PromptRow
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.models.make import Make, make
from palate.models.tokenizer import train_bpe
from palate.parallel import World
from palate.randomness import key
from palate.rewards.reward import Answers, Verdict
from palate.rewards.shaping import Shaping
from palate.stages._judging import Judging, Truncation
from palate.step import Optimiser, Stepper

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "ppo_details.json").read_text())
TEXTS = ["The soup is warm and the bread is old.", "A sour cake, they said. They said it twice."]
TOKENIZER = train_bpe(TEXTS, 300)
PROMPT = PromptRow([7], "one", "say", {})


def close(actual: Tensor, expected: Any) -> bool:
    """Whether float64 results have the printed digits."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return actual.shape == expected.shape and torch.allclose(actual.double(), expected, rtol=1e-9, atol=1e-12)


class Written:
    """A cast, or a reward, that says the numbers it was given. Cells it was given none for hold garbage."""

    label = "written"

    def __init__(self, **numbers: Sequence[Any]) -> None:
        self.numbers = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in numbers.items()}

    def logp(self, role: str, batch: Tokens, temperature: float) -> Tensor:
        return self._placed(role, batch).masked_fill(~batch.action_BT, 0.0)

    def values(self, role: str, batch: Tokens) -> Tensor:
        return self._placed(role, batch)

    def chunked(self, batch: Tokens, speak: Callable[[Tokens], Tensor]) -> Tensor:
        return speak(batch)

    def score(self, answers: Answers) -> Verdict:
        return Verdict(self.numbers["scores"], None, {"written": self.numbers["scores"]})

    def _placed(self, role: str, batch: Tokens) -> Tensor:
        """A prompt token, the answer's places, and perhaps one more behind."""
        said_BT = torch.full(batch.tokens_BT.shape, 77.0, dtype=torch.float64)
        said_BT[:, 1 : 1 + self.numbers[role].shape[1]] = self.numbers[role]
        return said_BT


def rollouts_of(responses: Sequence[Sequence[int]]) -> Rollouts:
    """One prompt token each, then a whole sampled answer of fixed length."""
    tokens = torch.tensor([[7, *row] for row in responses])
    action = torch.ones_like(tokens, dtype=torch.bool)
    action[:, 0] = False
    unfinished = torch.zeros(len(responses), dtype=torch.bool)
    return Rollouts(
        tokens,
        torch.ones_like(action),
        action,
        torch.zeros(tokens.shape, dtype=torch.float64),
        unfinished,
        torch.zeros(len(responses), dtype=torch.long),
        version=0,
        limit=len(responses[0]),
    )


def prepared(algorithm: ppo.Algorithm, scored: Scored, **numbers: Sequence[Any]) -> Experience:
    return algorithm.prepare(cast(Cast, Written(**numbers)), scored)


# --- the TL;DR work: details 49 to 54 --------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
def test_a_tldr_rollout_through_the_library(whiten: bool) -> None:
    """Details 49 to 54: cut at EOS, −1 without one, masks, the score behind the answer, whitening within masks."""
    case = GOLDEN[f"nplus_rewards_gae_whiten_rewards_{whiten}"]
    given, expected = case["inputs"], case["outputs"]
    truncation = Truncation(token=given["eos_id"], train_on_cut=True)
    shaping = Shaping(missing_eos_penalty=given["penalty"])
    judging = Judging(Written(scores=given["rm_scores"]), None, shaping, truncation, TOKENIZER, World())
    scored, heard = judging.score(rollouts_of(given["responses"]), [PROMPT], {"kl_coef": given["kl_coef"]})
    assert close(scored.score_B, expected["scores_after_penalty"])
    assert heard["rewards/written/mean"] == pytest.approx(sum(given["rm_scores"]) / 5)  # before the penalty
    algorithm = ppo.Algorithm(score_position="after", whiten_rewards=whiten)
    done = prepared(algorithm, scored, policy=given["logprobs"], reference=given["ref_logprobs"], value=given["values"])
    answer = slice(1, 9)
    assert (~done.action_BT[:, answer]).int().tolist() == expected["padding_mask"]
    assert (~done.value_mask_BT[:, answer]).int().tolist() == expected["padding_mask_p1"]
    assert not done.value_mask_BT[:, 9:].any()  # nothing behind an answer of full length
    assert close(done.value_BT[:, answer], expected["values_masked"])
    assert close(done.returns_BT[:, answer], expected["returns"])
    assert close(done.advantage_BT[:, answer], expected["advantages"])
    named = {"objective/kl": "objective_kl", "objective/non_score_reward": "objective_non_score_reward"}
    named["objective/entropy"] = "objective_entropy_true_sampled"  # 51: not the one with −1 for each padding
    for ours, theirs in named.items():
        assert done.metrics[ours] == pytest.approx(expected[theirs], rel=1e-9)
    assert done.metrics["objective/scores"] == pytest.approx(scored.score_B.mean().item())


# --- the 2019 work: details 30 to 34, 39, 40 -------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
def test_a_rollout_of_2019_through_the_library(whiten: bool) -> None:
    """Details 33, 34, 36, 40: the score on the last of all tokens, rewards scaled, returns from raw advantages."""
    case = GOLDEN[f"reward_composition_lmhp_whiten_{whiten}"]
    given, expected = case["inputs"], case["outputs"]
    rows, length = len(given["scores"]), len(given["logprobs"][0])
    scores = torch.tensor(given["scores"], dtype=torch.float64)
    rollouts = rollouts_of([[9] * length] * rows)
    nothing = torch.zeros(rollouts.tokens_BT.shape, dtype=torch.float64)
    scored = Scored(rollouts, scores, nothing, {}, {"kl_coef": given["beta"]})
    zeros = [[0.0] * length] * rows
    algorithm = ppo.Algorithm(whiten_rewards=whiten, whiten_advantages=False, lam=1.0)
    done = prepared(algorithm, scored, policy=given["logprobs"], reference=given["ref_logprobs"], value=zeros)
    to_go = done.returns_BT[:, 1:]
    rewards = to_go - torch.nn.functional.pad(to_go[:, 1:], (0, 1))  # γ = λ = 1 without values: returns are sums
    assert torch.allclose(rewards, torch.tensor(expected["rewards"], dtype=torch.float64), atol=1e-9)
    assert done.metrics["objective/kl"] == pytest.approx(expected["objective_kl"], rel=1e-9)
    assert done.metrics["objective/rlhf_reward"] == pytest.approx(expected["objective_score_total"], rel=1e-9)
    assert done.metrics["objective/entropy"] == pytest.approx(expected["objective_entropy"], rel=1e-9)


def test_the_reward_sees_the_cut_answer_and_the_policy_learns_from_all_of_it() -> None:
    """Details 30 to 32 and 49 by one switch."""
    case = GOLDEN["truncate_after_and_reject"]
    given, expected = case["inputs"], case["outputs"]
    rollouts = rollouts_of(given["responses"])
    seen: list[Answers] = []

    class Looking(Written):
        def score(self, answers: Answers) -> Verdict:
            seen.append(answers)
            return super().score(answers)

    for on_cut in (False, True):
        truncation = Truncation(token=given["truncate_token"], after=given["truncate_after"], train_on_cut=on_cut)
        shaping = Shaping(missing_eos_penalty=given["penalty"])
        judging = Judging(Looking(scores=given["rm_scores"]), None, shaping, truncation, TOKENIZER, World())
        scored, _ = judging.score(rollouts, [PROMPT], {"kl_coef": 0.1})
        shown = seen[-1].rollouts
        kept = torch.tensor(expected["postprocessed"]) != given["pad_id"]
        assert torch.equal(shown.action_BT[:, 1:], kept)
        assert close(scored.score_B, expected["scores"])
        assert scored.rollouts.finished_B.int().tolist() == expected["valid"]
        assert torch.equal(scored.rollouts.action_BT[:, 1:], kept if on_cut else torch.ones_like(kept))


def test_the_adaptive_coefficient_of_a_rollout_is_the_one_before_it() -> None:
    """Detail 39: β steers the next rollout, by the KL per sequence of this one and the answers in it."""
    logp, ref = [[-1.0, -2.0]] * 4, [[-1.5, -1.75]] * 4
    rollouts = rollouts_of([[9, 9]] * 4)
    nothing = torch.zeros(4, 3, dtype=torch.float64)
    scored = Scored(rollouts, torch.zeros(4, dtype=torch.float64), nothing, {}, {"kl_coef": 0.15})
    far, near = 1 - 0.2 * 4 / 10_000, 1 + (0.25 / 0.3 - 1) * 4 / 10_000
    for target, after in ((6.0, 0.15 * far), (0.3, 0.15 * near), (None, 0.15)):
        algorithm = ppo.Algorithm(target_kl=target, horizon=10_000)
        done = prepared(algorithm, scored, policy=logp, reference=ref, value=[[0.0, 0.0]] * 4)
        assert done.metrics["objective/kl"] == pytest.approx(0.25)
        assert done.metrics["objective/kl_coef"] == 0.15
        assert done.metrics["objective/non_score_reward"] == pytest.approx(-0.15 * 0.25)
        assert done.memory["kl_coef"] == pytest.approx(after, rel=1e-12)


# --- a real cast before its first step: details 9, 10, 14, 28, 33, 38, 52, 57 ----------------------------------------

SIZES = Make(architecture="gpt2", hidden_size=32, layers=2, heads=2, vocabulary=300, context=64)


def real(
    layout: str = "shared", temperature: float = 0.7, reference: bool = True, **settings: Any
) -> tuple[Cast, Scored]:
    """A tiny cast and a rollout of its own, with scores 1 to 6."""
    start = make(SIZES, TEXTS, 3)
    seats = assemble(Layout(kind=layout, **settings), start, ("policy", "reference", "value"), 5)  # pyright: ignore
    if not reference:
        with torch.no_grad():
            for parameter in seats.seat("reference").trunk.parameters():
                parameter.add_(0.02)
    engine = LocalEngine(
        seats.seat("policy").trunk, start.tokenizer, Sampling(temperature=temperature, max_new_tokens=12)
    )
    prompts = [start.tokenizer.encode(text) for text in ("The soup", "A", "They said it")]
    rollouts = engine.generate(prompts, [key("details", row) for row in range(6)])
    scores = torch.arange(1.0, 7.0)
    return seats, Scored(rollouts, scores, torch.zeros(rollouts.tokens_BT.shape), {}, {"kl_coef": 0.2})


@torch.no_grad()
def experience(algorithm: ppo.Algorithm, seats: Cast, scored: Scored) -> Experience:
    return algorithm.prepare(seats, scored)


@pytest.mark.parametrize("layout", ["separate", "shared", "adapters", "hydra"])
@pytest.mark.parametrize("old", ["sampled", "recomputed"])
def test_the_first_minibatch_of_a_real_policy(layout: str, old: Any) -> None:
    """Details 9, 10, 14, 38: ratio 1, approxkl 0, nothing clipped, a surrogate of about 0, at any temperature."""
    seats, scored = real(layout)
    algorithm = ppo.Algorithm(old_logprobs=old)
    batch = experience(algorithm, seats, scored)
    stepper = Stepper(seats.parameters(algorithm.trains), Optimiser(learning_rate=1e-3), World())
    seen = stepper.step(batch, lambda part: algorithm.loss(seats, part), Microbatch(rows=4), 1e-3)
    assert seen["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert seen["policy/approxkl_avg"] < 1e-9
    assert seen["policy/clipfrac_avg"] == seen["val/clipfrac_avg"] == 0.0
    assert abs(seen["loss/policy_avg"]) < 1e-5
    later = stepper.step(batch, lambda part: algorithm.loss(seats, part), Microbatch(rows=4), 1e-3)
    assert later["policy/approxkl_avg"] > 1e-7  # the step did move the policy


def test_before_the_first_step_rewards_are_the_scores_alone() -> None:
    """Details 28, 33, 36: the reference is the policy and values are 0, so advantages are discounted scores."""
    seats, scored = real("shared")
    algorithm = ppo.Algorithm(whiten_advantages=False, lam=0.9)
    batch = experience(algorithm, seats, scored)
    assert not batch.value_BT.any()
    assert batch.metrics["objective/kl"] == batch.metrics["objective/non_score_reward"] == 0.0
    assert batch.metrics["objective/rlhf_reward"] == 3.5
    for row in range(6):
        places = batch.action_BT[row].nonzero()[:, 0]
        behind = torch.arange(len(places) - 1, -1, -1.0)
        expected = scored.score_B[row] * 0.9**behind
        torch.testing.assert_close(batch.advantage_BT[row, places], expected)
        torch.testing.assert_close(batch.returns_BT[row, places], expected)
    moved = experience(algorithm, *real("shared", reference=False))
    assert moved.metrics["objective/kl"] != 0.0


def test_advantages_are_white_and_chunks_do_not_matter() -> None:
    """Details 36, 54, 57."""
    seats, scored = real("separate", value_init="random", reference=False)
    whole = experience(ppo.Algorithm(whiten_rewards=True, score_position="after"), seats, scored)
    said = whole.advantage_BT[whole.action_BT]
    assert said.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert said.var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    for seats.budget in (1, 50):
        parts = experience(ppo.Algorithm(whiten_rewards=True, score_position="after"), seats, scored)
        for name in ("logp_BT", "value_BT", "returns_BT", "advantage_BT"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-5, rtol=1e-5)


def test_a_value_that_starts_as_the_reward_model_knows_the_score_behind_the_answer() -> None:
    """Detail 52, and why detail 51 puts the score there: the error in that state is 0 before the first step."""
    start, judge = make(SIZES, TEXTS, 3), make(SIZES, TEXTS, 4)
    head = assemble(Layout(), judge, ("reward",), 6).seat("reward").head
    seats = assemble(Layout(), start, ("policy", "reference", "value"), 5, value_start=replace(judge, head=head))
    _, scored = real("separate")
    reward = Cast({"reward": seats.seat("value")})
    rows = scored.rollouts
    with torch.no_grad():
        score_B = reward.scores("reward", Tokens(rows.tokens_BT, rows.real_BT, rows.action_BT))
    scored = replace(scored, score_B=score_B, rollouts=replace(rows, limit=None))
    batch = experience(ppo.Algorithm(score_position="after"), seats, scored)
    last_B = credit.last_true_index(batch.value_mask_BT)
    assert torch.equal(last_B, credit.last_true_index(batch.action_BT) + 1)
    at = (torch.arange(6), last_B)
    torch.testing.assert_close(batch.value_BT[at], score_B, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.returns_BT[at], score_B, atol=1e-5, rtol=1e-5)


def test_the_reward_model_reads_the_question_too() -> None:
    """Details 1 and 18: another question, another reward; rows in another order, rewards in that order."""
    loaded = make(SIZES, TEXTS, 3)
    seats = assemble(Layout(), loaded, ("reward",), 5)
    tokens = torch.randint(3, 280, (4, 9), generator=torch.Generator().manual_seed(1))
    here = torch.ones_like(tokens, dtype=torch.bool)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        scores = seats.scores("reward", Tokens(tokens, here, here))
        shuffled = seats.scores("reward", Tokens(tokens[order], here, here))
        tokens[:, 0] = (tokens[:, 0] - 2) % 277 + 3
        asked_otherwise = seats.scores("reward", Tokens(tokens, here, here))
    torch.testing.assert_close(shuffled, scores[order])
    assert ((asked_otherwise - scores).abs() > 1e-4).all()

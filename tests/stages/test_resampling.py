"""Dynamic sampling: which groups are kept, when it stops, and a cursor that survives stops and kills."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from palate.algorithms.grpo import Algorithm
from palate.batches import Rollouts, Scored
from palate.data.encode import PromptRow
from palate.settings import PalateError, Stopped
from palate.stages import _resampling
from palate.stages._resampling import Round
from tests.algorithms import graded_cases as cases
from tests.stages import tiny_runs

PAD = 7


def a_round(turn: int, *groups: tuple[float, float], width: int = 5, dense: bool = False) -> Round:
    """Groups of two answers with the given scores; row r of turn t says token 100·t + r everywhere."""
    rows = 2 * len(groups)
    tokens = 100 * turn + torch.arange(rows)[:, None].expand(rows, width).clone()
    mask = torch.ones(rows, width).bool()
    done, owner = torch.ones(rows).bool(), torch.arange(rows) // 2
    rollouts = Rollouts(tokens, mask, mask, -tokens.float(), done, owner, 3, 0.7, 9)
    scores = torch.tensor(groups).flatten()
    token_reward = torch.zeros(rows, width)
    if dense:
        token_reward[:, 1], scores = scores, torch.zeros(rows)
    scored = Scored(rollouts, scores, token_reward, {"r": scores}, {"kl_coef": 0.5})
    prompts = [PromptRow(key=f"{turn}.{g}", tokens=[turn], text=f"{turn}.{g}", columns={}) for g in range(len(groups))]
    return Round(
        scored, prompts, {"rewards/r/mean": float(scores.mean()), "sampling/sampling_logp_difference/max": 0.0}
    )


def filled(rounds: list[Round], more: int) -> tuple[Round, list[int]]:
    asked: list[int] = []

    def ask(turn: int) -> Round:
        asked.append(turn)
        return rounds[turn]

    algorithm: Any = Algorithm(num_generations=2, dynamic_sampling=more)
    return _resampling.filled(ask, algorithm, PAD, 4), asked


SAME, OTHER = (0.5, 0.5), (0.0, 1.0)


@pytest.mark.parametrize("dense", [False, True])
def test_groups_without_spread_are_replaced_by_the_first_of_later_rounds_that_have_some(dense: bool) -> None:
    rounds = [
        a_round(0, SAME, OTHER, SAME, dense=dense),
        a_round(1, SAME, SAME, OTHER, width=8, dense=dense),
        a_round(2, OTHER, OTHER, SAME, dense=dense),
        a_round(3, OTHER, OTHER, OTHER),
    ]
    found, asked = filled(rounds, 9)
    assert asked == [0, 1, 2], "no more than it takes"
    assert [p.key for p in found.prompts] == ["0.1", "1.2", "2.0"]
    rows = found.scored.rollouts
    assert rows.prompt_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.tokens_BT[:, 0].tolist() == [2, 3, 104, 105, 200, 201]
    assert rows.tokens_BT[0].tolist() == [2] * 5 + [PAD] * 3
    assert rows.tokens_BT[2].tolist() == [104] * 8
    assert rows.real_BT.sum(-1).tolist() == rows.action_BT.sum(-1).tolist() == [5, 5, 8, 8, 5, 5]
    assert rows.logp_BT.shape == found.scored.token_reward_BT.shape == (6, 8)
    assert (rows.version, rows.temperature, rows.limit, found.scored.memory) == (3, 0.7, 9, {"kl_coef": 0.5})
    worth = found.scored.score_B + found.scored.token_reward_BT.sum(-1)
    assert worth.tolist() == found.scored.parts["r"].tolist() if not dense else [0, 1, 0, 1, 0, 1]
    assert worth.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.drawn == 3
    assert found.seen["sampling/groups_dropped"] == pytest.approx(5 / 9)
    assert found.seen["sampling/rounds"] == 3
    if not dense:
        assert found.seen["rewards/r/mean"] == pytest.approx(0.5), "of everything that was drawn"


def test_where_rounds_do_not_suffice_the_rest_is_filled_in_the_order_drawn() -> None:
    found, asked = filled([a_round(0, SAME, SAME, OTHER), a_round(1, SAME, OTHER, SAME)], 1)
    assert asked == [0, 1]
    assert [p.key for p in found.prompts] == ["0.0", "0.2", "1.1"]


def test_a_full_first_round_draws_no_other_and_nothing_is_drawn_unasked() -> None:
    full = [a_round(0, OTHER, OTHER)]
    found, asked = filled(full, 5)
    assert asked == [0]
    assert found.scored.rollouts.tokens_BT.equal(full[0].scored.rollouts.tokens_BT)
    poor = [a_round(0, SAME, SAME)]
    assert filled(poor, 0)[0] is poor[0]


def test_scores_that_differ_by_rounding_are_equal() -> None:
    found, _ = filled([a_round(0, (0.3, 0.3 + 1e-7), OTHER), a_round(1, OTHER, OTHER)], 1)
    assert [p.key for p in found.prompts] == ["0.1", "1.0"]


def test_no_group_with_spread_in_any_round_stops_the_run() -> None:
    with pytest.raises(PalateError, match=r"rollout 4: in none of 6 groups, drawn in 3 rounds, .* reward is constant"):
        filled([a_round(turn, SAME, SAME) for turn in range(3)], 2)


# --- real runs --------------------------------------------------------------------------------------------------------


def stage(folder: Path, **changes: Any) -> dict[str, Any]:
    algorithm = {"kind": "grpo", "num_generations": 2, "num_mini_batches": 2, "dynamic_sampling": 2}
    return cases.stage(folder, algorithm, **{"total_episodes": 40, "sample_steps": 1, **changes})


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def die() -> None:
    raise RuntimeError("gone")


@pytest.mark.parametrize(("end", "fault"), [(interrupt, Stopped), (die, RuntimeError)])
def test_stopped_or_killed_it_ends_as_if_it_had_not_been(
    end: Callable[[], None], fault: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the minibatches of rollout 4; a kill goes on from the checkpoint of rollout 2, a stop from there."""
    whole = tiny_runs.run(tmp_path, stage(tmp_path), name="whole") / "1-ppo"
    rows = tiny_runs.timeless(tiny_runs.lines(whole / "metrics.jsonl"))
    rounds = [int(row["sampling/rounds"]) for row in rows]
    assert sum(rounds[:2]) > 2, "the cursor is ahead of the rollouts when the checkpoint is written"
    with monkeypatch.context() as patch:
        after = Algorithm.after

        def ending(self: Algorithm, cast: Any, number: int) -> None:
            after(self, cast, number)
            if number == 7:
                end()

        patch.setattr(Algorithm, "after", ending)
        with pytest.raises(fault):
            tiny_runs.run(tmp_path, stage(tmp_path), name="again")
    again = tiny_runs.run(tmp_path, stage(tmp_path), name="again") / "1-ppo"
    assert tiny_runs.equal(tiny_runs.weights(again), tiny_runs.weights(whole))
    for name in ("metrics.jsonl", "samples.jsonl", "tokens.jsonl"):
        ours, theirs = (tiny_runs.timeless(tiny_runs.lines(f / name)) for f in (again, whole))
        assert ours == theirs, name


def test_the_cursor_counts_every_batch_drawn_and_a_prompt_drawn_again_is_answered_anew(tmp_path: Path) -> None:
    loop: Any = tiny_runs.online_loop(tmp_path / "stage", stage(tmp_path))
    rounds = [loop._iteration(number)["sampling/rounds"] for number in (1, 2)]
    assert loop.drawn == sum(rounds) > 2
    answers: dict[str, list[Any]] = {}
    for turn in range(5):  # 16 prompts in batches of 4: the fifth batch begins them once more
        asked = loop._ask(3, turn)
        rows = asked.scored.rollouts
        for p, prompt in enumerate(asked.prompts):
            said = rows.tokens_BT[rows.prompt_B == p][rows.action_BT[rows.prompt_B == p]]
            answers.setdefault(prompt.key, []).append(said.tolist())
    twice = [said for said in answers.values() if len(said) == 2]
    assert twice
    assert all(first != second for first, second in twice)


def test_samples_of_a_rollout_are_those_that_were_kept(tmp_path: Path) -> None:
    """Prompt and answer stay together when groups of several rounds are put together."""
    folder = tiny_runs.run(tmp_path, stage(tmp_path, total_episodes=24, reward=_of_the_prompt)) / "1-ppo"
    rows = tiny_runs.lines(folder / "samples.jsonl")
    assert rows
    for row in rows:
        assert row["score"] == pytest.approx(_of_the_prompt([row["prompt"]], [row["completion"]])[0], abs=1e-5)


def _of_the_prompt(prompts: list[str], completions: list[str]) -> list[float]:
    """Even numbers are all worth the same; an odd one's answers by themselves, plus the number."""
    numbers = [int(p.split()[1]) for p in prompts]
    return [n + (sum(map(ord, c)) % 97 / 97 if n % 2 else 0.0) for n, c in zip(numbers, completions, strict=True)]


def test_a_constant_reward_ends_with_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PalateError, match="rollout 1: in none of 12 groups, drawn in 3 rounds"):
        tiny_runs.run(tmp_path, stage(tmp_path, reward=_constant))


def _constant(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * len(completions)

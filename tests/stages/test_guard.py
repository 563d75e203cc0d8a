"""Numbers that are not finite: the weights stay, the batch is kept, the run goes on, back once, or ends with 3."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from palate import step
from palate.batches import Rows
from palate.models.heads import fresh_head
from palate.models.load import load
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.settings import NotFinite, PalateError, Stopped
from palate.stages._order import Order
from tests.stages import tiny_runs
from tests.stages.tiny_runs import equal, lines, run, timeless, warnings, weights

ROWS = 32
POISON, CUE = "~", "^"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokens(model: Path) -> dict[str, int]:
    """The ids of the two cues."""
    tokenizer = load(str(model), "policy").tokenizer
    return {"poison": tokenizer.encode(POISON)[0], "cue": tokenizer.encode(CUE)[0]}


def write(path: Path, name: str, per_step: int, marks: dict[int, str]) -> dict[str, Any]:
    """Demonstrations of which one in each of the steps (or rollouts) named has a mark in its prompt."""
    order = Order([1] * ROWS, per_step, False, (1, name))
    marked = {order.batch(number - 1)[0]: mark for number, mark in marks.items()}
    rows = [{"prompt": f"Is {marked.get(i, '')} {i} odd?", "completion": " yes" * (i % 3 + 1)} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "shuffle": False}


def sft(model: Path, data: Any, tokens: dict[str, int], **changes: Any) -> dict[str, Any]:
    """Eight steps of four rows, a checkpoint after every second."""
    algorithm = {"kind": "tests.stages.tricks:Poisoned", **tokens, **changes.pop("algorithm", {})}
    return tiny_runs.sft(model, data, algorithm=algorithm, num_train_epochs=1, **changes)


def ppo(model: Path, prompts: Any, **changes: Any) -> dict[str, Any]:
    """Four rollouts of eight answers, each learnt from in four steps."""
    algorithm = {"kind": "tests.stages.tricks:PoisonedPPO", **changes.pop("algorithm", {})}
    return tiny_runs.ppo(model, prompts, algorithm=algorithm, total_episodes=32, save_steps=1, **changes)


# --- one step ---------------------------------------------------------------------------------------------------------


def test_a_skipped_step_moves_neither_weights_nor_adam(
    model: Path, tokens: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, seen before and after each step of a real stage; the batch put aside is the batch that broke it."""
    data = write(tmp_path / "rows.jsonl", "sft", 4, {3: POISON})
    moved: list[bool] = []
    taken: list[Rows] = []
    honest = step.Stepper.step

    def watched(self: step.Stepper, batch: Any, *more: Any) -> dict[str, float]:
        before = [p.detach().clone() for p in self.parameters], {n: x.clone() for n, x in self.state().items()}
        taken.append(batch)
        try:
            return honest(self, batch, *more)
        finally:
            same = all(map(torch.equal, before[0], self.parameters)) and equal(before[1], self.state())
            moved.append(not same)
            assert all(p.grad is None for p in self.parameters)

    monkeypatch.setattr(step.Stepper, "step", watched)
    folder = run(tmp_path, sft(model, data, tokens)) / "1-sft"
    assert moved == [True, True, False, True, True, True, True, True]
    rows = lines(folder / "metrics.jsonl")
    assert [row.get("steps_skipped") for row in rows] == [None, None, 1, 1, 1, 1, 1, 1]
    assert "loss" not in rows[2]
    kept = load_file(folder / "skipped" / "step-00000003-0001.safetensors")
    expected = {name: getattr(taken[2], name) for name in ("tokens_BT", "real_BT", "action_BT")}
    assert equal(kept, expected)
    assert (kept["tokens_BT"] == tokens["poison"]).any()
    said = json.loads((folder / "skipped" / "step-00000003-0001.json").read_text())
    assert said == {
        "step": 3,
        "why": "loss, gradient norm: not a finite number; no weight was moved.",
        "batch": "Examples",
    }
    [told] = [text for text in warnings(folder) if "skipped" in text]
    assert told.startswith("step 3 was skipped (1 in a row): loss, gradient norm: not a finite number")
    assert told.endswith(str(folder / "skipped" / "step-00000003-0001.safetensors"))


def test_three_in_a_row_are_survived(model: Path, tokens: dict[str, int], tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", "sft", 4, dict.fromkeys((3, 4, 5, 7), POISON))
    folder = run(tmp_path, sft(model, data, tokens)) / "1-sft"
    rows = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {row["lr"] for row in rows if "lr" in row} == {1e-3}
    assert rows[-1]["steps_skipped"] == 4
    assert len([text for text in warnings(folder) if "skipped" in text]) == 4


# --- four in a row ----------------------------------------------------------------------------------------------------


def test_the_fourth_in_a_row_goes_back_and_the_second_time_ends(
    model: Path, tokens: dict[str, int], tmp_path: Path
) -> None:
    """Poison that no rate helps: back to the checkpoint before the last step taken, half the rate, and then exit 3."""
    data = write(tmp_path / "rows.jsonl", "sft", 4, dict.fromkeys((5, 6, 7, 8), POISON))
    stage = sft(model, data, tokens)
    with pytest.raises(NotFinite, match=r"sft: 4 steps in a row.*Lower optimiser\.learning_rate.*skipped"):
        run(tmp_path, stage)
    folder = tmp_path / "tiny" / "1-sft"
    rows = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row.get("lr") for row in rows] == [1e-3, 1e-3, 5e-4, 5e-4, None, None, None]
    assert len([text for text in warnings(folder) if "half the learning rate" in text]) == 1
    with pytest.raises(NotFinite):  # and it stays so
        run(tmp_path, stage)


@pytest.mark.parametrize(("save_steps", "begun"), [(1, 3), (2, 2), (100, 0)])
def test_half_the_rate_rescues_a_run_that_went_too_fast(
    save_steps: int, begun: int, model: Path, tokens: dict[str, int], tmp_path: Path
) -> None:
    """Step 4 leads too far, so 5 to 8 are skipped. Of no use is the checkpoint of step 4, nor any inside the streak."""
    data = write(tmp_path / "rows.jsonl", "sft", 4, {})
    stage = sft(model, data, tokens, algorithm={"furthest": 2.8e-3}, save_steps=save_steps)
    folder = run(tmp_path, stage) / "1-sft"
    rows = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9)), "the curve does not fork and has no gap"
    rates = [row.get("lr") for row in rows]
    assert rates[: begun + 1] == [1e-3] * begun + [5e-4]
    assert set(rates[begun + 1 :]) <= {5e-4, None}
    assert len([text for text in warnings(folder) if "half the learning rate" in text]) == 1


@pytest.mark.slow
def test_the_command_ends_with_3_and_one_message_also_after_a_kill(
    model: Path, tokens: dict[str, int], tmp_path: Path
) -> None:
    """Real processes: the first is killed in the streak after it went back, the second ends as one never killed."""
    marks = dict.fromkeys((5, 6, 7, 8), POISON)
    data = write(tmp_path / "rows.jsonl", "sft", 4, marks)
    bell = tmp_path / "bell"
    stage = sft(model, data, {**tokens, "cue": tokens["poison"]}, algorithm={"bell": str(bell)})
    recipe = tmp_path / "burst.yaml"
    recipe.write_text(yaml.safe_dump({"name": "burst", "output_dir": str(tmp_path), "stages": [stage]}))
    command = [sys.executable, "-m", "palate", "run", str(recipe)]
    bell.write_text(f"{int(signal.SIGKILL)} 6")
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.count("palate: sft: 4 steps in a row gave numbers that are not finite") == 1
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in lines(tmp_path / "burst" / "1-sft" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


# --- stops and kills on the way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "time"), [(2, 1), (6, 1), (8, 1), (4, 2), (5, 2), (8, 2)])
def test_counters_and_rate_survive_a_stop(
    at: int, time: int, model: Path, tokens: dict[str, int], tmp_path: Path
) -> None:
    """Steps 5 to 8 are skipped, the run goes back to step 3. Stopped before, in and after that, it ends the same."""
    settings = {"furthest": 2.2e-3, "bell": str(tmp_path / "bell")}
    data = write(tmp_path / "rows.jsonl", "sft", 4, {1: POISON, at: CUE})
    stage = sft(model, data, tokens, algorithm=settings, save_steps=3)
    whole = run(tmp_path, stage, name="whole") / "1-sft"
    (tmp_path / "bell").write_text(f"{int(signal.SIGTERM)} {time}")
    with pytest.raises(Stopped):
        run(tmp_path, stage, name="stopped")
    stopped = run(tmp_path, stage, name="stopped") / "1-sft"
    assert not (tmp_path / "bell").exists()
    rows = lines(whole / "metrics.jsonl")
    assert [row.get("lr") for row in rows[:4]] == [None, 1e-3, 1e-3, 5e-4], "it went back"
    assert timeless(lines(stopped / "metrics.jsonl")) == timeless(rows)
    assert equal(weights(stopped), weights(whole))


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_a_spoilt_minibatch_is_skipped_and_the_rest_of_the_rollout_is_learnt(
    model: Path, tokens: dict[str, int], tmp_path: Path
) -> None:
    prompts = write(tmp_path / "rows.jsonl", "ppo", 8, {2: POISON})
    folder = run(tmp_path, ppo(model, prompts, algorithm={"poison": tokens["poison"]})) / "1-ppo"
    rows = lines(folder / "metrics.jsonl")
    assert [row.get("steps_skipped") for row in rows] == [None, 2, 2, 2], "once in each of two passes"
    assert all("loss/policy_avg" in row for row in rows)
    kept = load_file(folder / "skipped" / "step-00000002-0001.safetensors")
    assert kept["tokens_BT"].shape[0] == 4
    assert {"tokens_BT", "action_BT", "logp_BT", "advantage_BT", "value_BT", "returns_BT"} <= set(kept)
    assert (kept["tokens_BT"] == tokens["poison"]).any()


def test_a_nan_of_prepare_skips_the_whole_rollout_once(model: Path, tokens: dict[str, int], tmp_path: Path) -> None:
    """One bad rollout is one bad batch: it must not use up the patience by its number of passes."""
    prompts = write(tmp_path / "rows.jsonl", "ppo", 8, {2: POISON})
    folder = run(tmp_path, ppo(model, prompts, algorithm={"nan": tokens["poison"]})) / "1-ppo"
    rows = lines(folder / "metrics.jsonl")
    assert [row.get("steps_skipped") for row in rows] == [None, 1, 1, 1]
    assert "loss/policy_avg" not in rows[1]
    kept = load_file(folder / "skipped" / "step-00000002-0001.safetensors")
    assert kept["tokens_BT"].shape[0] == 8
    assert kept["advantage_BT"].isnan().any()
    assert any("advantage: " in text and "numbers are not finite" in text for text in warnings(folder))


def nan_embedding(folder: Path, token: int, head: bool) -> Path:
    """A model, or a reward model, that is nan wherever it has read the token."""
    shape = Make(hidden_size=32, layers=2, heads=2, vocabulary=280, context=48, tie=False)
    made = make(shape, tiny_runs.PROMPTS, 11)
    made.trunk.model.get_input_embeddings().weight.data[token] = float("nan")  # pyright: ignore[reportOptionalMemberAccess]
    judge = fresh_head(made.trunk.width, "reference", 1) if head else None
    if judge is not None:
        judge.trained = True
    save(folder, made.trunk, made.tokenizer, Card("nan", "nothing"), judge)
    return folder


def test_nan_logits_and_nan_scores_of_a_reward_model_skip_the_rollout(
    model: Path, tokens: dict[str, int], tmp_path: Path
) -> None:
    prompts = write(tmp_path / "rows.jsonl", "ppo", 8, {2: POISON, 3: POISON})
    judge = str(nan_embedding(tmp_path / "judge", tokens["poison"], head=True))
    folder = run(tmp_path, ppo(model, prompts, reward=judge), name="scores") / "1-ppo"
    assert [row.get("steps_skipped") for row in lines(folder / "metrics.jsonl")] == [None, 1, 2, 2]
    assert any("gives nan to answer" in text for text in warnings(folder))
    kept = load_file(folder / "skipped" / "step-00000002-0001.safetensors")
    assert (kept["tokens_BT"] == tokens["poison"]).any(), "the answers that could not be scored are kept"
    broken = nan_embedding(tmp_path / "broken", tokens["poison"], head=False)
    folder = run(tmp_path, ppo(broken, prompts), name="logits") / "1-ppo"
    assert [row.get("steps_skipped") for row in lines(folder / "metrics.jsonl")] == [None, 1, 2, 2]
    assert any("logits are not numbers" in text for text in warnings(folder))


def nothing(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("nan")] * len(completions)


def test_a_reward_function_that_returns_nan_is_the_users_to_mend(model: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "rows.jsonl", "ppo", 8, {})
    with pytest.raises(PalateError, match=r"nothing: nan for answer 0.*not a finite number") as caught:
        run(tmp_path, ppo(model, prompts, reward={"kind": "function", "function": nothing}))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_policy_that_diverges_altogether_ends_with_3(adaptive: bool, model: Path, tmp_path: Path) -> None:
    """Weights at 1e25 after the first step: whatever is asked of them next is nan, and no formula trips over it."""
    prompts = write(tmp_path / "rows.jsonl", "ppo", 4, {})
    algorithm = {"kind": "ppo", "num_ppo_epochs": 1, "num_mini_batches": 1}
    algorithm |= {"target_kl": 6.0, "old_logprobs": "sampled"} if adaptive else {}
    wild = {"learning_rate": 1e25, "schedule": "constant"}
    stage = ppo(model, prompts, optimiser=wild) | {"algorithm": algorithm, "rollout_batch_size": 4}
    with pytest.raises(NotFinite, match="ppo: 4 steps in a row") as caught:
        run(tmp_path, stage)
    assert caught.value.exit_code == 3

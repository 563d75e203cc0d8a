"""The published details that show in whole stages: schedules, batches, epochs, normalised rewards, and the defaults."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from palate.batches import Tokens
from palate.cast import Cast, Seat
from palate.data.collate import examples
from palate.data.encode import Encoding, encode_demonstrations, encode_prompts
from palate.data.source import Data, load
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.live import Display
from palate.models.load import load as load_model
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.randomness import key
from palate.run import execute, plan
from palate.stages._order import Order
from palate.step import Optimiser
from palate.worlds import tasting_room

SMALL = Make(architecture="gpt2", hidden_size=16, layers=1, heads=2, context=192, vocabulary=320)
WORLD = "world:tasting_room"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model that was never trained."""
    folder = tmp_path_factory.mktemp("base") / "model"
    texts = [r.prompt + r.completion for r in tasting_room.records("demonstrations", 80, 1)]
    made = make(SMALL, texts, key("details"))
    save(folder, made.trunk, made.tokenizer, Card(title="base", base="nothing"))
    return str(folder)


def run(tmp_path: Path, *stages: dict[str, Any], seed: int = 3) -> list[Path]:
    """Run stages; their folders."""
    asked = {"name": "trial", "output_dir": str(tmp_path), "seed": seed, "stages": list(stages)}
    return [stage.folder for stage in execute(plan(asked), Display(Console(quiet=True))).stages]


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reward_stage(base: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "name": "reward",
        "model": base,
        "data": {"path": f"{WORLD}/pairs", "rows": 24},
        "algorithm": {"kind": "reward"},
        "optimiser": {"learning_rate": 1e-3},
        "batch_size": 8,
        "logging_steps": 1,
        **more,
    }


# --- normalisation: details 20 to 22, 35 -----------------------------------------------------------------------------


def scores(folder: Path, tokens: Tokens) -> torch.Tensor:
    judge = load_model(folder / "model", "reward")
    with torch.no_grad():
        return Cast({"reward": Seat(judge.trunk, None, judge.head)}).scores("reward", tokens)


def test_the_pretrained_models_answers_get_mean_0_and_deviation_1(base: str, tmp_path: Path) -> None:
    """Detail 21, by the population's deviation (35); scoring the same answers again gives the targets."""
    sampling = Sampling(temperature=0.7, max_new_tokens=12, fixed_length=True)
    asked = {"rows": 16, "sampling": sampling.model_dump()}
    (folder,) = run(tmp_path, reward_stage(base, normalise=asked))
    speaker = load_model(base)
    records = load(Data(path=f"{WORLD}/pairs", rows=24), 3)
    prompts = encode_prompts(records, speaker.tokenizer, Encoding()).rows[:16]
    keys = [key(3, "reward", "normalise", prompt.key) for prompt in prompts]
    rows = LocalEngine(speaker.trunk, speaker.tokenizer, sampling).generate([p.tokens for p in prompts], keys)
    found = scores(folder, Tokens(rows.tokens_BT, rows.real_BT, rows.action_BT))
    assert found.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert found.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    last = logged(folder)[-1]
    assert last["accuracy"] >= 0.0
    head = load_model(folder / "model", "reward").head
    assert head is not None
    assert (head.gain.item(), head.bias.item()) != (1.0, 0.0)


def test_references_get_mean_0_and_the_scale_stays_as_it_was_learnt(base: str, tmp_path: Path) -> None:
    """Detail 22: the bias alone, over demonstrations with their EOS."""
    data = {"path": f"{WORLD}/demonstrations", "rows": 20}
    asked = {"before": False, "over": "demonstrations", "data": data, "rows": 20, "std": None}
    (folder,) = run(tmp_path, reward_stage(base, normalise=asked))
    judge = load_model(folder / "model", "reward")
    records = load(Data.model_validate(data), 3, "all")
    rows = encode_demonstrations(records, judge.tokenizer, Encoding()).rows
    assert all(row.tokens[-1] == judge.tokenizer.eos for row in rows)
    found = scores(folder, examples(rows, judge.tokenizer.pad))
    assert found.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert judge.head is not None
    assert judge.head.gain.item() == 1.0


# --- schedules, batches, epochs: details 12, 13, 15, 16, 41, 58 ------------------------------------------------------


def test_a_reward_model_sees_every_row_once_while_its_rate_falls_to_zero(base: str, tmp_path: Path) -> None:
    """Details 12 and 13: 24 pairs by 8 are 3 steps, at (1 − start/24) of the peak."""
    (folder,) = run(tmp_path, reward_stage(base))
    rows = logged(folder)
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * (1 - start / 24) for start in (0, 8, 16)])
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_the_rate_is_constant_within_a_rollout_and_prompts_come_again(base: str, tmp_path: Path) -> None:
    """Details 12, 15 and 58: floor(total / batch) rollouts, (1 − (u−1)/N) of the peak in all steps of one."""
    stage = {
        "kind": "online",
        "model": base,
        "reward": {"kind": "gold"},
        "prompts": {"path": f"{WORLD}/prompts", "rows": 10},
        "algorithm": {"kind": "ppo", "num_ppo_epochs": 2, "num_mini_batches": 2},
        "layout": {"kind": "shared"},
        "optimiser": {"learning_rate": 3e-4},
        "sampling": {"max_new_tokens": 6},
        "total_episodes": 27,
        "rollout_batch_size": 8,
    }
    (folder,) = run(tmp_path, stage)
    rows = logged(folder)
    assert [row["episode"] for row in rows] == [8.0, 16.0, 24.0]
    assert [row["lr"] for row in rows] == pytest.approx([3e-4, 2e-4, 1e-4])
    assert all(row["first_minibatch/ratio_error"] < 1e-5 for row in rows)
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[1]["objective/kl"] != rows[0]["objective/kl"]


def test_each_epoch_is_a_fresh_order_of_the_same_rows() -> None:
    """Details 11, 13 and 58: one permutation per epoch, from the seed alone; the remainder waits for the next one."""
    order = Order([5] * 10, 4, False, (1, "rlhf"))
    drawn = [order.batch(number) for number in range(6)]
    epochs = [drawn[i] + drawn[i + 1] for i in (0, 2, 4)]
    assert all(max(Counter(rows).values()) == 1 for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3
    assert [Order([5] * 10, 4, False, (1, "rlhf")).batch(number) for number in range(6)] == drawn
    assert Order([5] * 10, 4, False, (2, "rlhf")).batch(0) != drawn[0]


def test_the_optimisers_defaults_are_the_published_ones() -> None:
    """Details 12, 16, 41: epsilon 1e-5, neither weight decay nor clipping, no warm-up, linear to zero."""
    asked = Optimiser()
    assert (asked.eps, asked.weight_decay, asked.max_grad_norm, asked.warmup_steps) == (1e-5, 0.0, None, 0)
    assert asked.betas == (0.9, 0.999)
    rates = [asked.rate(update, 4) / asked.learning_rate for update in range(4)]
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])

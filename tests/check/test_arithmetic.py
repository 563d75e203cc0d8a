"""Batch arithmetic: against numbers worked out by hand, and against what real runs log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palate.check.arithmetic import Offline, Online, counted, typical
from palate.check.found import RecipeFound
from palate.cutting import Microbatch
from palate.live import Display
from palate.run import execute, plan_file


def test_the_words_of_an_online_stage() -> None:
    numbers = Online(prompts=4000, rollout=512, group=8, passes=4, minibatches=4, microbatch=32, episodes=30720)
    words = numbers.batches().words
    assert words[0] == "512 answers a rollout = 64 prompts × 8"
    assert words[1] == "4 epochs × 4 minibatches = 16 optimiser steps a rollout"
    assert words[2] == "128 answers a step = 4 micro-batches of at most 32"
    assert words[3] == "60 rollouts = 30,720 answers, 960 optimiser steps"
    assert words[4] == "3,840 of 4,000 prompts are asked, each once"


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (3840, "3,840 of 3,840 prompts are asked, each once"),
        (1280, "1,280 prompts are asked 3.0 times each"),
        (32, "32 prompts are fewer than a rollout asks: each is asked 2.0 times a rollout, with other draws"),
    ],
)
def test_how_often_a_prompt_is_asked(prompts: int, said: str) -> None:
    assert Online(prompts, 512, 8, 4, 4, 32, 30720).batches().words[4] == said


def test_episodes_that_fill_no_rollout_are_named() -> None:
    found = Online(100, 16, 1, 1, 1, 16, 50).batches()
    assert found.numbers["rollouts"] == 3
    assert found.numbers["left_over_answers"] == 2
    assert found.words[-1] == "2 of 50 episodes fill no rollout and are left out"


def test_an_offline_stage_by_hand() -> None:
    found = Offline(rows=103, held_out=5, batch=10, microbatch=4, epochs=3, most_steps=None).batches()
    assert found.numbers["microbatches"] == 3
    assert found.numbers["steps_per_epoch"] == 10
    assert found.numbers["left_over_rows"] == 3
    assert found.numbers["optimiser_steps"] == 30
    assert found.turns == 30
    assert "3 of 103 fill no batch" in found.words[1]
    assert "3 epochs × 10 = 30 optimiser steps" in found.words


def test_micro_batches_by_tokens_are_counted_by_rows_of_usual_length() -> None:
    assert typical(Microbatch(tokens=4096), 64, 100.0) == 40
    assert typical(Microbatch(rows=8, tokens=4096), 64, 100.0) == 8
    assert typical(Microbatch(tokens=4096), 64, 5000.0) == 1
    assert typical(Microbatch(), 64, 100.0) == 64
    found = Offline(103, 5, 64, typical(Microbatch(tokens=4096), 64, 100.0), 3, None, tokens=4096).batches()
    assert found.words[0] == "64 rows a step = about 2 micro-batches of at most 4,096 tokens"
    assert Online(100, 64, 1, 1, 1, 64, 640, tokens=9000).batches().words[2] == "64 answers a step = one forward pass"


def test_max_steps_end_it() -> None:
    found = Offline(rows=100, held_out=0, batch=10, microbatch=10, epochs=3, most_steps=25).batches()
    assert found.numbers["optimiser_steps"] == 25
    assert found.words[-1] == "max_steps ends it after 25 optimiser steps = 2.50 epochs"


def test_one_is_not_many() -> None:
    assert counted(1, "epoch") == "1 epoch"
    assert counted(2000, "minibatch", "minibatches") == "2,000 minibatches"


def test_a_real_run_takes_as_many_steps(tasting: tuple[Path, list[str]], seen: RecipeFound, tmp_path: Path) -> None:
    """Optimiser steps of the training stages, rollouts and answers of the online one, as metrics.jsonl has them."""
    recipe, words = tasting
    planned = plan_file(recipe, [*words, f"output_dir={tmp_path}"])
    execute(planned, Display(quiet=True))
    for index, stage in enumerate(seen.stages[:3]):
        assert stage.seen.batches is not None
        lines = (planned.stage_folder(index) / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert last["step"] == stage.seen.batches.turns
        if "episode" in last:
            assert last["episode"] == stage.seen.batches.numbers["answers"]
        else:
            per_epoch = stage.seen.batches.numbers["steps_per_epoch"]
            assert last["epoch"] == pytest.approx(stage.seen.batches.turns / per_epoch)

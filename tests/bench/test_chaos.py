"""The harness that kills runs: it sees a run that does not survive, and says where a run was killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import broken, page
from bench.run_directory import damage, differences, going_on

SABOTAGED = """
import sys
from pathlib import Path
from bench.chain import CHAIN
from bench.chaos_worker import Worker
from palate.checkpoint import CheckpointStore
from palate.settings import PalateError
from palate.step import Stepper

names = ("rlhf: between two minibatches", "rlhf: in the middle of decoding")
links = [link for link in CHAIN if link.moment.name in names]
worker = Worker(Path(sys.argv[1]), "1")
assert worker.record.unequal == []

restore, Stepper.restore = Stepper.restore, lambda *given: None
worker.chain(links, "forgetful")
assert [text.partition(":")[0] for text in worker.record.unequal] == ["forgetful"], worker.record
assert worker.record.astray == worker.record.missed == []
Stepper.restore = restore

def fails(*given, **more):
    raise PalateError("a checkpoint must be deleted by hand")

CheckpointStore.newest = fails
worker.chain(links, "stuck")
assert "must be deleted by hand" in worker.record.astray[-1], worker.record
"""


@pytest.mark.slow
def test_a_run_that_forgets_and_one_that_needs_a_hand_are_seen(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SABOTAGED, str(tmp_path / "home")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=one_thread)
    assert done.returncode == 0, done.stderr


def a_run(folder: Path, loss: float = 1.0, seconds: float = 2.0, weights: bytes = b"weights") -> Path:
    for stage in ("1-sft", "2-rlhf"):
        (folder / stage / "model").mkdir(parents=True)
        (folder / stage / "model" / "model.safetensors").write_bytes(weights)
        row = {"step": 1, "loss": loss, "step_time": seconds}
        (folder / stage / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        (folder / stage / "DONE").write_text(str(seconds), encoding="utf-8")
    return folder


def test_two_runs_differ_by_weights_and_numbers_but_not_by_the_clock(tmp_path: Path) -> None:
    one = a_run(tmp_path / "one")
    assert differences(one, a_run(tmp_path / "later", seconds=3.0)) == []
    assert differences(one, a_run(tmp_path / "other", weights=b"weightz")) == [
        "1-sft/model/model.safetensors",
        "2-rlhf/model/model.safetensors",
    ]
    assert differences(one, a_run(tmp_path / "third", loss=1.5)) == ["1-sft/metrics.jsonl", "2-rlhf/metrics.jsonl"]
    shorter = a_run(tmp_path / "shorter")
    (shorter / "2-rlhf" / "DONE").unlink()
    assert differences(one, shorter) == ["2-rlhf/DONE"]


def test_the_folder_says_what_was_going_on(tmp_path: Path) -> None:
    run, long_ago = tmp_path / "run", 0.0
    run.mkdir()
    assert going_on(run, long_ago) == "starting"
    a_run(run)
    assert going_on(run, long_ago) == "2-rlhf: done"
    (run / "2-rlhf" / "DONE").unlink()
    assert going_on(run, long_ago) == "2-rlhf: finishing"
    (run / "2-rlhf" / ".model.partial").mkdir()
    assert going_on(run, long_ago) == "2-rlhf: saving the model"
    (run / "2-rlhf" / "checkpoints" / ".staged-00000003").mkdir(parents=True)
    assert going_on(run, long_ago) == "2-rlhf: saving a checkpoint"
    far_off = 1e12  # none of it is of the process that was killed
    assert going_on(run, far_off) == "2-rlhf: opening"


def test_damage_is_one_bit_or_one_file_of_the_newest_checkpoint(tmp_path: Path) -> None:
    assert damage(tmp_path, random.Random(0)) is None
    seen: set[str] = set()
    for seed in range(8):
        run = tmp_path / str(seed)
        for age, step in ((1000, "step-00000001"), (2000, "step-00000002")):
            folder = run / "1-sft" / "checkpoints" / step
            folder.mkdir(parents=True)
            (folder / "state.json").write_bytes(b"state")
            os.utime(folder, (age, age))
        said = damage(run, random.Random(seed))
        assert said is not None
        assert "step-00000002/state.json" in said
        seen.add(said.split()[-1])
        left = run / "1-sft" / "checkpoints" / "step-00000002" / "state.json"
        if left.exists():
            changed = [a ^ b for a, b in zip(left.read_bytes(), b"state", strict=True)]
            assert sum(byte.bit_count() for byte in changed) == 1
        assert (run / "1-sft" / "checkpoints" / "step-00000001" / "state.json").read_bytes() == b"state"
    assert seen == {"flipped", "away"}


def test_the_page_counts_and_names_every_broken_promise() -> None:
    kill = {"way": "by the clock", "where": "1-sft: training", "name": "", "damage": None, "restart": 0.5}
    good: Mapping[str, Any] = {
        "kills": [kill, {**kill, "name": "exact", "way": "at an exact moment", "restart": None}],
        "runs": 3,
        "named": 1,
        "imports": 3.0,
        "whole": 2.0,
        "astray": [],
        "unequal": [],
        "missed": [],
    }
    text = page([good], 7)
    assert broken([good]) == []
    assert "2 kills and stops of 3 runs, seed 7: 1 by the clock, 1 at an exact moment" in text
    assert "| exact moments met | 1 of 1 |" in text
    assert "0.50 s after imports" in text
    assert "| 1-sft: training | 2 |" in text
    bad = {**good, "unequal": ["chain: 1-sft/DONE"], "astray": ["x: exit code 1"], "missed": ["exact"]}
    assert len(broken([good, bad])) == 3
    assert "**unequal end: chain: 1-sft/DONE**" in page([good, bad], 7)

"""The cost of saving is measured on real stages, its parts add up, and a slow disk shows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.saving import Cost, measure, table
from palate import checkpoint, settings
from palate.step import Stepper

RECIPE = settings.read_yaml(Path(__file__).parents[2] / "bench" / "soak.yaml")
WORDS = ["stages.sft.save_steps=1", "stages.rlhf.total_episodes=160"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on shared cores wait for each other longer than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_saves_of_a_real_run_are_counted_and_their_parts_add_up(tmp_path: Path) -> None:
    before = (checkpoint.save_file, checkpoint.sha256, os.fsync, Stepper.step)
    found = measure(RECIPE, WORDS, tmp_path)
    assert before == (checkpoint.save_file, checkpoint.sha256, os.fsync, Stepper.step)
    assert {name: cost.steps for name, cost in found.items()} == {"sft": 4, "rlhf": 20}
    assert {name: len(cost.saves) for name, cost in found.items()} == {"sft": 3, "rlhf": 9}
    for cost in found.values():
        assert 0 < cost.share < 1
        assert cost.size > 10_000
        for whole, *parts in zip(cost.saves, *cost.parts.values(), strict=True):
            assert all(part > 0 for part in parts)
            assert sum(parts) < whole


def test_a_slow_disk_shows_as_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: time.sleep(0.02))
    cost = measure(RECIPE, WORDS, tmp_path)["rlhf"]
    synced = 5  # tensors, state, manifest, their folder, and the folder it is renamed in
    assert min(cost.parts["fsync"]) >= synced * 0.02
    assert all(seconds > 0.5 * whole for seconds, whole in zip(cost.parts["fsync"], cost.saves, strict=True))


def test_the_share_is_saving_over_training() -> None:
    parts = {"serialise and write": [0.3, 0.1], "sha256": [0.1, 0.1], "fsync": [0.5, 0.7]}
    cost = Cost(began=10.0, ended=50.0, steps=100, size=2**20, saves=[1.0, 1.0], parts=parts)
    assert cost.share == 0.05
    line = "| sft | 100 | 40.0 s | 1.0 MiB | 2 | 1000.0 ms | 200.0 ms | 100.0 ms | 600.0 ms | 100.0 ms | 5.00% |"
    assert line in table({"sft": cost})

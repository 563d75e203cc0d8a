"""`palate check --geometry`: an update has one gradient however it is cut; a loss that divides is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from palate.check.geometry import Cut, Geometry, distance

MEAN = '''
from dataclasses import replace

from palate.algorithms import sft
from palate.batches import Term


class Mean(sft.Algorithm):
    """The mistake the law is there for: each part is divided by its own tokens."""

    def loss(self, cast, batch):
        found = super().loss(cast, batch)
        mean = found.terms["loss"].total / batch.counts()["tokens"]
        return replace(found, terms={"loss": Term(mean * batch.size, "rows")})
'''
RECIPE: dict[str, Any] = {
    "stages": [
        {
            "kind": "train",
            "name": "sft",
            "model": {"hidden_size": 32, "layers": 1, "heads": 2, "vocabulary": 300, "context": 160},
            "data": {"path": "world:tasting_room/demonstrations", "rows": 24},
            "algorithm": {"kind": "sft"},
            "batch_size": 7,
            "microbatch_size": 3,
        },
        {
            "kind": "online",
            "name": "rlhf",
            "model": "stage:sft",
            "reward": {"kind": "length", "at_most": 20},
            "prompts": {"path": "world:tasting_room/prompts", "rows": 12},
            "algorithm": {"kind": "ppo"},
            "sampling": {"max_new_tokens": 8},
            "rollout_batch_size": 8,
            "total_episodes": 8,
            "microbatch_size": 8,
        },
    ]
}


def check(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "mean_lab.py").write_text(MEAN)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "palate", "check", "tiny.yaml", "--geometry", *words]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_one_update_has_one_gradient_however_it_is_cut(tmp_path: Path) -> None:
    done = check(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["healthy"]
    assert [stage["stage"] for stage in found["stages"]] == ["sft", "rlhf"]
    hows = [[cut["how"] for cut in stage["cuts"]] for stage in found["stages"]]
    for how, rows in zip(hows, (3, 4), strict=True):
        assert [how[0], *how[2:]] == [f"micro-batches of {rows}", "single rows, accumulated", "shares of 2 ranks"]
        assert re.fullmatch(r"micro-batches of \d+ tokens", how[1])
    assert all(0 <= cut["distance"] <= 1e-6 for stage in found["stages"] for cut in stage["cuts"])
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith((".", "__"))) == [
        "mean_lab.py",
        "tiny.yaml",
    ]


@pytest.mark.slow
def test_a_loss_that_divides_is_found_on_the_users_own_recipe(tmp_path: Path) -> None:
    done = check(tmp_path, "stages.sft.algorithm.kind=mean_lab:Mean")
    assert done.returncode == 2
    assert "the gradient depends on the cut" in done.stdout
    assert "A loss must be a sum over rows" in " ".join(done.stdout.split())


def test_other_weights_are_infinitely_far() -> None:
    one = {"a": torch.tensor([3.0, 4.0])}
    assert distance(one, {"a": torch.tensor([3.0, 4.5])}) == pytest.approx(0.1)
    assert distance(one, {"b": one["a"]}) == float("inf")


def test_a_cut_beyond_the_bound_is_a_fault_that_names_it() -> None:
    found = Geometry("sft", 8, 10, 1e-6, (Cut("micro-batches of 4", 1e-7), Cut("shares of 2 ranks", 0.5)))
    assert not found.holds
    assert "cut into shares of 2 ranks" in found.fault
    assert not Geometry("sft", 8, 10, 1e-6, (Cut("micro-batches of 4", 1e-7),)).fault

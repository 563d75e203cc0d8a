"""Kill a run at any moment, give the same command again: the end is bitwise that of a run never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

RECIPE = {
    "name": "short",
    "stages": [
        {
            "kind": "train",
            "name": "sft",
            "model": {"hidden_size": 32, "layers": 2, "heads": 2, "vocabulary": 400, "context": 96},
            "data": {"path": "world:tasting_room/demonstrations", "rows": 120},
            "algorithm": {"kind": "sft"},
            "optimiser": {"learning_rate": 3e-3, "warmup_steps": 2},
            "batch_size": 8,
            "save_steps": 3,
            "logging_steps": 1,
        },
        {
            "kind": "train",
            "name": "reward",
            "model": "stage:sft",
            "data": {"path": "world:tasting_room/rankings", "rows": 48},
            "algorithm": {"kind": "reward"},
            "optimiser": {"learning_rate": 1e-3},
            "batch_size": 8,
            "save_steps": 1,
            "normalise": {"before": True, "model": "stage:sft", "rows": 8, "sampling": {"max_new_tokens": 8}},
        },
        {
            "kind": "online",
            "name": "rlhf",
            "model": "stage:sft",
            "value_model": "stage:reward",
            "reward": "stage:reward",
            "prompts": {"path": "world:tasting_room/prompts", "rows": 40},
            "algorithm": {"kind": "ppo", "num_mini_batches": 2, "target_kl": 0.5, "horizon": 100},
            "optimiser": {"learning_rate": 1e-3, "variant": "tensorflow"},
            "sampling": {"max_new_tokens": 12},
            "rollout_batch_size": 16,
            "total_episodes": 96,
            "save_steps": 1,
        },
    ],
}


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "palate", "run", str(folder / "short.yaml"), f"output_dir={folder / 'runs'}"]


def start(folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    (folder / "short.yaml").write_text(yaml.safe_dump(RECIPE))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(folder), env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def finish(folder: Path) -> None:
    process = start(folder)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()


def kill_when(folder: Path, sign: Path, pause: float) -> None:
    """Start the run and kill it hard, a little after `sign` exists."""
    process = start(folder)
    deadline = time.monotonic() + 200
    while not sign.exists():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    clock = ("step_time", "tokens_per_second", "time")
    lines = (folder / "runs" / "short" / stage / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in yaml.safe_load(line).items() if k not in clock} for line in lines]


@pytest.mark.slow
def test_a_killed_run_ends_bitwise_like_one_never_killed(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(whole)
    run = broken / "runs" / "short"
    kill_when(broken, run / "1-sft" / "checkpoints" / "step-00000006", 0.02)
    assert not (run / "1-sft" / "DONE").exists()
    kill_when(broken, run / "2-reward" / "checkpoints" / "step-00000002", 0.05)
    kill_when(broken, run / "3-rlhf" / "checkpoints" / "step-00000003", 0.15)
    assert (run / "2-reward" / "DONE").exists()
    assert not (run / "3-rlhf" / "DONE").exists()
    finish(broken)
    for stage in ("1-sft", "2-reward", "3-rlhf"):
        for file in sorted((whole / "runs" / "short" / stage / "model").glob("*.safetensors")):
            ours, theirs = load_file(run / stage / "model" / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            assert all(ours[name].equal(theirs[name]) for name in theirs), f"{stage}/{file.name}"
        assert metrics(broken, stage) == metrics(whole, stage)

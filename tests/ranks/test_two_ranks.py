"""Two real processes: the same gradients, weights, statistics and samples as one, whatever is sharded."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from palate.models import linear

HERE = Path(__file__).resolve().parent


def names_of_checks() -> list[str]:
    """The checks by name, read off their file."""
    spec = importlib.util.spec_from_file_location("rank_checks", HERE / "checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_checks"] = module
    spec.loader.exec_module(module)
    return [name for name, _ in module.checks(Path())]


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank said of each check; both ranks are processes of their own."""
    folder = tmp_path_factory.mktemp("ranks")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(HERE / "checks.py"), str(folder)]
    started = [subprocess.Popen(command, env=environment(RANK=str(rank), **place)) for rank in (0, 1)]
    for process in started:
        assert process.wait(timeout=600) == 0
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", names_of_checks())
def test_two_ranks_agree_with_one(verdicts: list[dict[str, str]], name: str) -> None:
    for rank, said in enumerate(verdicts):
        assert not said[name], f"rank {rank}: {said[name]}"


RECIPE: dict[str, Any] = {
    "name": "pair",
    "stages": [
        {
            "kind": "train",
            "name": "sft",
            "model": {"hidden_size": 32, "layers": 2, "heads": 2, "vocabulary": 400, "context": 160},
            "data": {"path": "world:tasting_room/demonstrations", "rows": 100, "held_out": 0.1},
            "algorithm": {"kind": "sft"},
            "optimiser": {"learning_rate": 3e-3, "warmup_steps": 2, "max_grad_norm": 1.0},
            "batch_size": 8,
            "microbatch_size": 3,
            "logging_steps": 1,
            "save_steps": 2,
        },
        {
            "kind": "train",
            "name": "reward",
            "model": "stage:sft",
            "data": {"path": "world:tasting_room/rankings", "rows": 32},
            "algorithm": {"kind": "reward"},
            "optimiser": {"learning_rate": 1e-3},
            "batch_size": 8,
            "logging_steps": 1,
        },
        {
            "kind": "online",
            "name": "rlhf",
            "model": "stage:sft",
            "value_model": "stage:reward",
            "reward": "stage:reward",
            "prompts": {"path": "world:tasting_room/prompts", "rows": 40},
            "algorithm": {
                "kind": "ppo",
                "num_mini_batches": 2,
                "target_kl": 0.5,
                "horizon": 100,
                "whiten_rewards": True,
            },
            # Adam turns the rounding noise of a weight that nothing moves into steps; a larger eps leaves it noise.
            "optimiser": {"learning_rate": 1e-4, "eps": 1e-4},
            "sampling": {"max_new_tokens": 12},
            "rollout_batch_size": 16,
            "microbatch_size": 3,
            "total_episodes": 64,
            "save_steps": 1,
            "sample_steps": 1,
        },
    ],
}


def alone(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "palate", "run", str(folder / "pair.yaml"), f"output_dir={folder}", *words]


def together(folder: Path, *words: str) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    return [*launch, "-m", "palate", "run", str(folder / "pair.yaml"), f"output_dir={folder}", *words]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and its run in one process."""
    folder = tmp_path_factory.mktemp("pair")
    # Runs that measured for themselves might multiply by different libraries, which round differently.
    (folder / "pair.yaml").write_text(yaml.safe_dump({**RECIPE, "linear": linear.backend()}))
    done = run(alone(folder, "name=one"))
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_run(folder: Path, name: str) -> None:
    """Weights within 4e-6 of one process, the same answers, the same curves.

    Two ranks multiply matrices of other sizes, which round differently; where a gradient is as small as Adam's ε, that
    is what is left of it after some steps.
    """
    for stage in ("1-sft", "2-reward", "3-rlhf"):
        for file in sorted((folder / "one" / stage / "model").glob("*.safetensors")):
            ours, theirs = load_file(folder / name / stage / "model" / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            # No comparison moves a reward head's bias, so Adam walks it on rounding noise alone.
            gaps = {n: float((ours[n] - theirs[n]).abs().max()) for n in theirs if n != "layers.bias"}
            assert max(gaps.values()) <= 4e-6, (stage, max(gaps, key=lambda n: gaps[n]), max(gaps.values()))
        rows, expected = (lines(folder / run / stage / "metrics.jsonl") for run in (name, "one"))
        assert [r["step"] for r in rows] == [r["step"] for r in expected]
        for row, right in zip(rows, expected, strict=True):
            assert row.keys() == right.keys()
            for metric in row.keys() - {"step_time", "tokens_per_second"}:
                assert row[metric] == pytest.approx(right[metric], rel=1e-4, abs=1e-5), (stage, row["step"], metric)
    answers = [
        [(r["step"], r["completion"]) for r in lines(folder / n / "3-rlhf" / "samples.jsonl")] for n in (name, "one")
    ]
    assert answers[0] == answers[1]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(sign: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not sign.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_torchrun_on_two_processes_is_the_run_of_one(lab: Path) -> None:
    done = run(together(lab, "name=replicated", "strategy=replicate"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sft: done in") == 1
    assert_same_run(lab, "replicated")


@pytest.mark.slow
def test_stopped_on_two_sharded_ranks_it_goes_on_in_one_process(lab: Path) -> None:
    process = subprocess.Popen(
        together(lab, "name=moved", "strategy=zero3"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(lab / "moved" / "3-rlhf" / "checkpoints" / "step-00000002", process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert said.count("palate: stopped. The same command goes on where it left off") == 1, said
    assert not (lab / "moved" / "3-rlhf" / "DONE").exists()
    done = run(alone(lab, "name=moved"))
    assert done.returncode == 0, done.stderr
    assert "sft: done before, skipped" in done.stderr
    assert_same_run(lab, "moved")


@pytest.mark.slow
def test_a_lost_rank_ends_all_with_one_message_and_a_run_that_goes_on(lab: Path) -> None:
    process = subprocess.Popen(
        together(lab, "name=torn", "strategy=zero2"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(lab / "torn" / "3-rlhf" / "checkpoints" / "step-00000002", process)
    (second,) = (pid for pid in children(process.pid) if ("RANK", "1") in variables(pid))
    os.kill(second, signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    messages = [line for line in said.splitlines() if line.startswith("palate:")]
    assert len(messages) == 1, said
    assert "another process of this run is gone" in messages[0]
    assert "it goes on from its newest checkpoint" in messages[0]
    done = run(together(lab, "name=torn", "strategy=replicate"))
    assert done.returncode == 0, done.stderr
    assert_same_run(lab, "torn")


@pytest.mark.slow
def test_a_fault_that_every_rank_finds_is_told_once(lab: Path) -> None:
    settings = run(together(lab, "name=bad", "stages.sft.batch_sise=4"))
    assert settings.stderr.count("there is no setting 'batch_sise'. Did you mean 'batch_size'?") == 1
    data = run(together(lab, "name=bad", "stages.sft.batch_size=1000"))
    assert data.stderr.count("rows do not fill one batch of 1000") == 1
    assert not (lab / "bad" / "1-sft" / "model").exists()


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def variables(pid: int) -> list[tuple[str, str]]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return [(name, value) for name, _, value in (pair.partition("=") for pair in pairs)]

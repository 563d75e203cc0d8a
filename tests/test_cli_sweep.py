"""`palate sweep` as a user gives it: killed for real, gone on with, one run that cannot work among those that can."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from palate.cli import main
from palate.live import Display
from palate.models import linear
from palate.run import execute, plan_file

MODEL = {"hidden_size": 16, "layers": 1, "heads": 2, "vocabulary": 300, "context": 128}
DATA = {"path": "world:tasting_room/demonstrations", "rows": 40}
RECIPE: dict[str, Any] = {
    "stages": [
        {"kind": "train", "name": "sft", "model": MODEL, "data": DATA, "algorithm": {"kind": "sft"}},
        {"kind": "train", "name": "more", "model": "stage:sft", "data": DATA, "algorithm": {"kind": "sft"}},
    ]
}
WORDS = ["two.yaml", "stages.more.model=stage:sft,nowhere", "stages.more.optimiser.learning_rate=1e-2", "--seeds", "2"]
SWEEP = Path("runs/two-sweep")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe of two stages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = {"linear": linear.backend()}  # processes that measured for themselves might choose, and round, differently
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**RECIPE, **one}))
    return tmp_path


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "palate", "sweep", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_for(what: Any, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


def is_held(run: Path) -> bool:
    """Whether a process is at work in a run directory."""
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_run_that_cannot_work_ends_no_other(folder: Path) -> None:
    first, second = SWEEP / "trial-000-seed-1", SWEEP / "trial-000-seed-2"
    sweep = start(*WORDS)
    wait_for((first / "2-more/DONE").exists)
    wait_for(lambda: (second / ".lock").exists() and is_held(second) and (second / "resolved.yaml").exists())
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    wait_for(lambda: not is_held(second))  # the run it had started does not stay behind
    finished = (first / "2-more/DONE").stat().st_mtime_ns

    again = start(*WORDS)
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 1, said
    assert "1 of 4 runs were done before" in said
    assert (first / "2-more/DONE").stat().st_mtime_ns == finished
    assert "trial-001-seed-1: sft taken over" in said
    assert "palate: 2 of 4 runs failed, the first of them trial-001-seed-1: " in said
    assert "nowhere" in (SWEEP / "trial-001-seed-2/FAILED").read_text()

    results = json.loads((SWEEP / "results.json").read_text())
    assert results["best"] == "trial-000"
    assert results["trials"][0]["values"].keys() == {"1", "2"}
    assert results["trials"][1]["verdict"] == "failed"
    assert "trial-001-seed-1" in (SWEEP / "report.html").read_text()
    assert "| trial-000 | stage:sft |" in (SWEEP / "report.md").read_text()

    alone = ["name=alone", "seed=2", "stages.more.optimiser.learning_rate=1e-2"]
    execute(plan_file(Path("two.yaml"), alone), Display(quiet=True))
    model = "2-more/model/model.safetensors"
    assert (second / model).read_bytes() == Path("runs/alone", model).read_bytes(), "an ordinary run, stopped or not"


def test_a_plan_is_shown_and_nothing_is_written(folder: Path) -> None:
    words = [
        "sweep",
        "two.yaml",
        "stages.more.batch_size=4,8",
        "stages.more.optimiser.learning_rate=1e-3,1e-2",
        "--plan",
    ]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 0, said.output
    assert "4 trials (grid) x seeds 1, 2, 3 = 12 runs" in said.output
    assert "trial-003  stages.more.batch_size=8  stages.more.optimiser.learning_rate=1e-2" in said.output
    assert "24 stages, of which 15 are made and 9 taken over" in said.output
    assert not Path("runs").exists()


def test_a_draw_is_planned_the_same_every_time(folder: Path) -> None:
    words = ["sweep", "two.yaml", "stages.more.optimiser.learning_rate=loguniform(1e-6,1e-4)", "--plan"]
    first, second = (CliRunner().invoke(main, words).output for _ in range(2))
    assert first == second
    assert first.count("learning_rate=") == 8


def test_a_fault_is_one_line_and_exit_code_2(folder: Path) -> None:
    said = CliRunner().invoke(main, ["sweep", "two.yaml", "stages.more.batch_sise=4,8"])
    assert said.exit_code == 2
    assert said.output == said.output.splitlines()[0] + "\n"
    assert "Did you mean 'batch_size'" in said.output


def test_under_torchrun_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = CliRunner().invoke(main, ["sweep", "two.yaml"])
    assert said.exit_code == 2
    assert "without torchrun" in said.output


def test_its_help_teaches(folder: Path) -> None:
    said = CliRunner().invoke(main, ["sweep", "--help"]).output
    for word in ("loguniform(1e-6,1e-4)", "--seeds", "--plan", "palate sweep recipe.yaml stages.1", "KEY=0.05,0.1,0.5"):
        assert word in said

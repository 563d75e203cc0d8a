"""`palate show` on a real run: what it prints equals what was logged, and every wrong question is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPE: dict[str, Any] = {
    "name": "short",
    "stages": [
        {
            "kind": "train",
            "name": "sft",
            "model": {"hidden_size": 32, "layers": 1, "heads": 2, "vocabulary": 300, "context": 128},
            "data": {"path": "world:tasting_room/demonstrations", "rows": 40},
            "algorithm": {"kind": "sft"},
        },
        {
            "kind": "online",
            "name": "rlhf",
            "model": "stage:sft",
            "reward": {"kind": "length", "at_most": 3},
            "prompts": {"path": "world:tasting_room/prompts", "rows": 16},
            "algorithm": {"kind": "ppo", "score_position": "after", "kl_coef": 0.5},
            "optimiser": {"learning_rate": 3e-3},
            "sampling": {"max_new_tokens": 8},
            "rollout_batch_size": 4,
            "total_episodes": 20,
            "sample_steps": 2,
        },
    ],
}


def palate(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command of a user, in a process of its own."""
    told = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **environment}
    return subprocess.run(
        [sys.executable, "-m", "palate", *words], cwd=cwd, env=told, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with one small run in runs/short."""
    here = tmp_path_factory.mktemp("show")
    (here / "short.yaml").write_text(yaml.safe_dump(RECIPE))
    done = palate("run", "short.yaml", cwd=here)
    assert done.returncode == 0, done.stderr
    return here


def shown(folder: Path, *words: str) -> Any:
    done = palate("show", "runs/short", *words, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_a_step_it_lists_the_steps_and_what_to_ask_next(folder: Path) -> None:
    said = palate("show", "runs/short", cwd=folder).stdout
    assert "rlhf: 4 answers token by token at each of 4 steps\n  1, 2, 4, 5\n" in said
    assert "next: palate show runs/short --step 1 --step 5" in said
    assert shown(folder)["stages"] == {"rlhf": [1, 2, 4, 5]}


def test_the_sums_over_a_whole_rollout_are_the_logged_metrics(folder: Path) -> None:
    """The rollout is the four answers that are written, so nothing is a sample here."""
    lines = (folder / "runs/short/2-rlhf/metrics.jsonl").read_text().splitlines()
    logged = {row["step"]: row for row in map(json.loads, lines)}
    for step in shown(folder, "--step", "2", "--step", "5")["steps"]:
        answers, metrics = step["answers"], logged[step["step"]]
        means = {name: sum(a["sums"][name] for a in answers) / 4 for name in ("kl", "kl_penalty", "score", "old_logp")}
        assert means["kl"] == pytest.approx(metrics["objective/kl"], abs=1e-5)
        assert abs(means["kl"]) > 1e-4
        assert means["kl_penalty"] == pytest.approx(metrics["objective/non_score_reward"], abs=1e-5)
        assert means["score"] == pytest.approx(metrics["objective/scores"], abs=1e-6)
        assert -means["old_logp"] == pytest.approx(metrics["objective/entropy"], abs=1e-4)
        returns = [t["return"] for a in answers for t in a["tokens"] if t.get("value_mask")]
        assert sum(returns) / len(returns) == pytest.approx(metrics["returns/mean"], abs=1e-5)
        assert step["logged"]["KL"] == metrics["objective/kl"]


def test_the_answers_are_those_of_the_samples(folder: Path) -> None:
    samples = [json.loads(line) for line in (folder / "runs/short/2-rlhf/samples.jsonl").read_text().splitlines()]
    for step in shown(folder, "--step", "1", "--step", "5")["steps"]:
        mine = [s for s in samples if s["step"] == step["step"]]
        for answer, sample in zip(step["answers"], mine, strict=True):
            assert answer["prompt"] == sample["prompt"]
            assert answer["score"] == pytest.approx(sample["score"])


def test_two_steps_stand_abreast_in_a_wide_terminal_only(folder: Path) -> None:
    words = ("show", "runs/short", "--step", "1", "--step", "5", "--row", "0")
    wide, narrow = (palate(*words, cwd=folder, COLUMNS=str(width)).stdout for width in (160, 80))
    assert any("rlhf, step 1 " in line and "rlhf, step 5" in line for line in wide.splitlines())
    assert [line for line in narrow.splitlines() if line.startswith("rlhf, step")] == ["rlhf, step 1", "rlhf, step 5"]
    assert max(map(len, narrow.splitlines())) <= 80
    assert "\x1b" not in wide + narrow


def test_a_stage_folder_is_enough(folder: Path) -> None:
    whole = palate("show", "runs/short", "--step", "4", cwd=folder).stdout
    assert palate("show", "runs/short/2-rlhf", "--step", "4", cwd=folder).stdout == whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/short", "--step", "3"], "no answers were written at step 3. The nearest: 2 and 4."),
        (["runs/short", "--step", "99"], "The nearest: 5."),
        (["runs/short", "--step", "5", "--row", "7"], "step 5 has no row 7 here. Rows written: 0, 1, 2, 3."),
        (["runs/short", "--stage", "rlfh", "--step", "5"], "Did you mean 'rlhf'?"),
        (["runs/short/1-sft", "--step", "5"], "only a stage of kind online samples answers, and here is sft (kind tra"),
        (["runs/absent", "--step", "5"], "runs/absent: there is no such run directory."),
    ],
)
def test_a_wrong_question_is_one_message_and_exit_code_2(folder: Path, words: list[str], said: str) -> None:
    done = palate("show", *words, cwd=folder)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_several_stages_with_answers_are_told_apart_by_name(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "twice"
    for number, name in ((1, "first"), (2, "second")):
        (run / f"{number}-{name}").mkdir(parents=True)
        (run / f"{number}-{name}" / "stage.yaml").write_text(f"kind: online\nname: {name}\n")
        (run / f"{number}-{name}" / "tokens.jsonl").write_text((folder / "runs/short/2-rlhf/tokens.jsonl").read_text())
    unclear = palate("show", "twice", "--step", "1", cwd=tmp_path)
    assert "2 stages have such answers: first, second. Choose one with --stage." in unclear.stderr
    assert unclear.returncode == 2
    clear = palate("show", "twice", "--step", "1", "--stage", "second", cwd=tmp_path)
    assert "second, step 1" in clear.stdout


def test_showing_imports_no_torch(folder: Path) -> None:
    asked = (
        "import sys; from palate.cli import main; main(['show', 'runs/short', '--step', '1'], standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{asked}; print('torch' in sys.modules)"], cwd=folder, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr

"""The last words of a run."""

from __future__ import annotations

import io
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from palate import closing
from palate.closing import close, next_steps
from palate.evaluation.win_rate import win_rate
from palate.live import Display
from palate.run import Outcome, StageOutcome


def _outcome(run: Path) -> Outcome:
    """A run of three stages as they leave their folders: a speaker with samples, a judge, an evaluation."""
    for name in ("1-sft", "2-reward", "3-evaluate"):
        (run / name / "model").mkdir(parents=True)
    (run / "1-sft" / "model" / "generation_config.json").write_text("{}")
    (run / "1-sft" / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": "what's hot?"}) + "\n")
    won = win_rate([1.0] * 3 + [0.0], [0.5] * 4)
    assert won is not None
    rate = asdict(won)
    found: dict[str, Any] = {"models": {"rlhf": {"win_rate": {"gold": rate}}, "sft": {"win_rate": {}}}}
    (run / "3-evaluate" / "evaluation.json").write_text(json.dumps(found))
    stages = (
        StageOutcome("sft", run / "1-sft", False, 65.0, {"step": 9, "loss": 1.25, "lr": 0.1}),
        StageOutcome("reward", run / "2-reward", True, 0.0, {"accuracy": 0.75, "note": None}),
        StageOutcome("evaluate", run / "3-evaluate", False, 3.0, {}),
    )
    return Outcome(run, stages, 70.0)


def _plan() -> Any:
    return SimpleNamespace(experiment=SimpleNamespace(seed=4, name="trial"))


def test_a_short_table_the_report_and_three_things_to_try(tmp_path: Path) -> None:
    written = io.StringIO()
    close(_outcome(tmp_path), _plan(), Display(Console(file=written, width=200)))
    said = written.getvalue()
    assert "sft" in said
    assert "1 min 05 s" in said
    assert "loss 1.250" in said
    assert "done before" in said
    assert "accuracy 75%" in said
    assert f"report: {tmp_path / 'report.html'}" in said
    assert len(said.partition("next:\n")[2].splitlines()) == 3


def test_a_win_rate_is_the_end_of_an_evaluation(tmp_path: Path) -> None:
    written = io.StringIO()
    close(_outcome(tmp_path), _plan(), Display(Console(file=written, width=200)))
    assert "rlhf wins 75% by gold" in written.getvalue()


def test_what_to_try_fits_what_is_there(tmp_path: Path) -> None:
    steps = next_steps(_outcome(tmp_path), _plan())
    assert "1-sft/model" in steps[0]
    assert """prompt='what'"'"'s hot?'""" in steps[0]
    assert "1-sft/samples.jsonl" in steps[1]
    assert "seed=5 name=trial-2" in steps[2]


@pytest.mark.parametrize("text", ["plain", "two words", "it's\nthree \\ lines\n"])
def test_a_quoted_prompt_is_one_line_that_a_shell_reads_back(text: str) -> None:
    quoted = closing._quoted(text)
    assert "\n" not in quoted
    said = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, text=True, check=True)
    assert said.stdout == text

"""Which stages would run: read off a run directory that lives through a whole life, and is never touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from palate.check.plan import states, words
from palate.live import Display
from palate.run import Plan, execute, plan_file
from tests.check.conftest import contents, sft


@pytest.fixture
def recipe(model: Path, demonstrations: Path, tmp_path: Path) -> Path:
    stages: list[dict[str, Any]] = [
        sft(str(model), str(demonstrations), save_steps=1, num_train_epochs=2),
        sft("stage:sft", str(demonstrations), name="second"),
    ]
    path = tmp_path / "twice.yaml"
    path.write_text(yaml.safe_dump({"name": "twice", "output_dir": str(tmp_path / "runs"), "stages": stages}))
    return path


def _kinds(plan: Plan) -> list[str]:
    before = contents(plan.folder) if plan.folder.exists() else None
    found = [state for state, _ in states(plan)]
    assert (contents(plan.folder) if plan.folder.exists() else None) == before
    return [f"{state.what} {state.because}".strip() for state in found]


def test_a_life(recipe: Path) -> None:
    first = plan_file(recipe)
    assert _kinds(first) == ["new", "new"]
    execute(first, Display(quiet=True))
    assert _kinds(first) == ["done", "done"]
    changed = plan_file(recipe, ["stages.second.optimiser.learning_rate=0.5"])
    assert _kinds(changed) == ["done", "again a change in settings.optimiser.learning_rate"]
    both = plan_file(recipe, ["stages.sft.batch_size=2"])
    assert _kinds(both) == ["again a change in settings.batch_size", "again a change in stages.sft"]
    execute(changed, Display(quiet=True))
    assert _kinds(first) == ["done", "done"]  # what was set aside would come back
    assert "replaced" in str(states(first)[1][0].folder)
    assert "will be skipped" in words(states(first)[1][0])


def test_a_stage_that_was_stopped_goes_on_from_its_checkpoint(recipe: Path) -> None:
    plan = plan_file(recipe)
    execute(plan, Display(quiet=True))
    kept = plan.stage_folder(0)
    (kept / "DONE").unlink()
    (kept / "checkpoints" / "step-00000003").mkdir(parents=True)
    shutil.rmtree(plan.stage_folder(1))
    assert _kinds(plan) == ["continue", "new"]
    state, _ = states(plan)[0]
    assert state.step == 3
    assert words(state) == f"goes on from checkpoint 3 in {kept}"


def test_changed_data_is_named(recipe: Path, demonstrations: Path) -> None:
    plan = plan_file(recipe)
    execute(plan, Display(quiet=True))
    demonstrations.write_text(demonstrations.read_text().replace("say", "tell"))
    assert _kinds(plan)[0] == f"again a change in files.{demonstrations}"
    assert str(demonstrations) in _kinds(plan)[1]
    (plan.stage_folder(0) / "DONE").unlink()
    (plan.stage_folder(0) / "checkpoints" / "step-00000003").mkdir(parents=True)
    _, refusal = states(plan)[0]
    assert "it changed since stage 'sft' began" in refusal


def test_a_model_that_was_touched_is_made_again(recipe: Path) -> None:
    plan = plan_file(recipe)
    execute(plan, Display(quiet=True))
    (plan.stage_folder(1) / "model" / "more.txt").write_text("not mine")
    assert _kinds(plan) == ["done", "again its model is not as DONE left it"]


def test_a_stage_that_only_moved_is_done(recipe: Path) -> None:
    plan = plan_file(recipe)
    execute(plan, Display(quiet=True))
    plan.stage_folder(1).rename(plan.folder / "7-second")
    assert _kinds(plan) == ["done", "done"]

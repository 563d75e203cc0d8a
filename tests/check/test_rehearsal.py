"""The scratch folder of a check: what stands in for models to come, and what is not even opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from palate.check.rehearsal import Rehearsal
from palate.models.load import Loading, load
from palate.run import plan_file
from palate.settings import PalateError
from tests.check.conftest import sft


@pytest.fixture
def rehearsal(model: Path, demonstrations: Path, tmp_path: Path) -> Rehearsal:
    """Of a recipe with one stage, whose scratch folder is `scratch`."""
    recipe = tmp_path / "one.yaml"
    recipe.write_text(yaml.safe_dump({"stages": [sft(str(model), str(demonstrations))]}))
    return Rehearsal(plan_file(recipe), tmp_path / "scratch")


def test_weights_beyond_this_machine_are_refused_unread(rehearsal: Rehearsal, model: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(model, huge)
    with (huge / "model.safetensors").open("wb") as file:
        file.truncate(1 << 43)  # sparse: it takes no room on the disk
    with pytest.raises(PalateError, match=r"huge: its weights are 8796\.1 GB and .* GB of memory are free here"):
        rehearsal.open(str(huge), rehearsal.workspace(0), "policy", Loading())


def test_a_policy_to_come_is_its_own_start(rehearsal: Rehearsal, model: Path) -> None:
    here = rehearsal.workspace(0)
    rehearsal.leave(here, str(model), load(model), judges=False, plain=True)
    assert rehearsal.models["sft"] == model
    assert not rehearsal.is_trained("stage:sft")
    assert rehearsal.is_trained(str(model))


def test_a_reward_model_to_come_gets_a_head_and_borrows_its_weights(rehearsal: Rehearsal, model: Path) -> None:
    here = rehearsal.workspace(0)
    rehearsal.leave(here, str(model), load(model), judges=True, plain=True)
    left = rehearsal.models["sft"]
    assert (left / "model.safetensors").resolve() == (model / "model.safetensors").resolve()
    assert load(left, "reward").head is not None
    assert not (model / "head.safetensors").exists()


def test_warnings_name_the_folder_of_the_run(rehearsal: Rehearsal) -> None:
    here = rehearsal.workspace(0)
    here.warn(f"rows are in {here.folder / 'skipped'}")
    assert rehearsal.warnings(here) == [f"rows are in {rehearsal.plan.stage_folder(0) / 'skipped'}"]

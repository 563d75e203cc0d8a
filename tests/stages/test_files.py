"""Whatever a stage reads from disk counts for its cache: change it, and the stage runs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palate.run import plan

ROLE = {"kind": "model"}


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, str]:
    """Files and model folders that are only looked at by name."""
    for name in ("policy", "value", "judge", "other", "truth"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("rows", "more"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a"}\n')
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def read(stage: dict[str, Any]) -> set[str]:
    """Names of the files and model folders a stage says it reads."""
    files = plan({"name": "files", "stages": [stage]}).stages[0].files()
    return {Path(f).parent.name if f.endswith("config.json") else Path(f).stem for f in files}


def test_an_online_stage(disk: dict[str, str]) -> None:
    mixture = {"kind": "mixture", "rewards": [{**ROLE, "model": disk["judge"]}, {**ROLE, "model": disk["other"]}]}
    stage = {"kind": "online", "model": disk["policy"], "value_model": disk["value"], "algorithm": {"kind": "ppo"}}
    stage |= {"reward": mixture, "watch": disk["truth"], "prompts": disk["rows"]}
    assert read(stage) == {"policy", "value", "judge", "other", "truth", "rows"}


def test_a_reward_stage_and_what_sets_its_scale(disk: dict[str, str]) -> None:
    stage = {"kind": "train", "model": disk["policy"], "data": disk["rows"], "algorithm": {"kind": "reward"}}
    assert read(stage) == {"policy", "rows"}
    assert read({**stage, "normalise": {"model": disk["other"], "data": disk["more"]}}) == {
        "policy",
        "rows",
        "other",
        "more",
    }


def test_an_evaluation(disk: dict[str, str]) -> None:
    stage = {"kind": "evaluate", "models": {"one": disk["policy"]}, "prompts": disk["rows"]}
    stage |= {"rewards": {"judge": disk["judge"]}, "comparisons": disk["more"]}
    assert read(stage) == {"policy", "rows", "judge", "more"}

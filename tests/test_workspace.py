"""The place a stage works in: logs that do not fork, references that resolve, warnings that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from palate.live import Display
from palate.parallel import World
from palate.settings import PalateError
from palate.workspace import Workspace, named_stages


def _workspace(folder: Path, **more: Any) -> Workspace:
    given: dict[str, Any] = {
        "folder": folder,
        "name": "rlhf",
        "seed": 1,
        "models": {"sft": folder / "sft-model"},
        "world": World(),
        "display": Display(Console(quiet=True)),
        "trackers": {},
        "settings": {},
    }
    return Workspace(**{**given, **more})


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_going_on_from_a_checkpoint_unsays_what_came_after_it(tmp_path: Path) -> None:
    here = _workspace(tmp_path)
    for step in (1, 2, 3, 4):
        here.log(step, {"loss": 1.0})
        here.sample(step, [{"prompt": "a"}, {"prompt": "b"}])
        here.tokens(step, [{"row": 0, "tokens": []}])
        here.warn("look")
    again = _workspace(tmp_path)
    again.resume(2)
    assert _steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert _steps(tmp_path / "samples.jsonl") == [1, 1, 2, 2]
    assert _steps(tmp_path / "tokens.jsonl") == [1, 2]
    assert _steps(tmp_path / "warnings.jsonl") == [1, 2]
    again.warn("look again")
    assert _steps(tmp_path / "warnings.jsonl") == [1, 2, 2]


def test_a_reference_is_the_model_folder_of_an_earlier_stage(tmp_path: Path) -> None:
    here = _workspace(tmp_path)
    assert here.resolve("stage:sft") == tmp_path / "sft-model"
    assert here.resolve("org/name") == Path("org/name")
    assert here.resolve("~/models") == Path.home() / "models"
    with pytest.raises(PalateError, match="references"):
        here.resolve("stage:reward")
    assert named_stages(["stage:sft", "gpt2", "stage:reward"]) == ["sft", "reward"]


def test_verls_names_are_added_on_request(tmp_path: Path) -> None:
    _workspace(tmp_path, verl_names=True).log(1, {"lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "lr": 0.5, "actor/lr": 0.5}


def test_a_skipped_checkpoint_is_a_warning_of_the_stage(tmp_path: Path) -> None:
    here = _workspace(tmp_path)
    here.store.save(1, {}, {})
    (tmp_path / "checkpoints" / "step-00000001" / "MANIFEST.json").unlink()
    assert here.store.newest() is None
    assert "step-00000001 is skipped" in (tmp_path / "warnings.jsonl").read_text()

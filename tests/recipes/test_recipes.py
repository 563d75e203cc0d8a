"""Every recipe that ships is valid as it stands, and runs from its first stage to its report on a laptop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from palate.diagnosis import report
from palate.live import Display
from palate.run import execute, plan_file
from tests.recipes.shrunk import SHRUNK

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def _overrides(recipe: str, places: dict[str, str]) -> list[str]:
    lines = SHRUNK[recipe]
    for name, folder in places.items():
        lines = tuple(line.replace(f"{{{name}}}", folder) for line in lines)
    return list(lines)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_as_it_ships(path: Path) -> None:
    assert plan_file(path).stages


def test_every_recipe_that_needs_no_real_data_is_run_below() -> None:
    """Those that read $PALATE_DATA run where the data are, for docs/results.md."""
    paths = [path for path in RECIPES.rglob("*.yaml") if "$PALATE_DATA" not in path.read_text(encoding="utf-8")]
    assert sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in paths) == sorted(SHRUNK)


@pytest.mark.parametrize("recipe", SHRUNK)
def test_every_recipe_runs_shrunk(recipe: str, pantry: dict[str, str], tmp_path: Path) -> None:
    asked = [*_overrides(recipe, pantry), f"output_dir={tmp_path}"]
    planned = plan_file(RECIPES / f"{recipe}.yaml", asked)
    folder = execute(planned, Display(Console(quiet=True))).folder
    for index, stage in enumerate(planned.stages):
        done = planned.stage_folder(index)
        assert (done / "DONE").is_file()
        assert all(math.isfinite(v) for row in _rows(done / "metrics.jsonl") for v in row.values())
        assert (done / "model").is_dir() == (stage.name != "evaluate")
    trained = _rows(planned.stage_folder(len(planned.stages) - 2) / "metrics.jsonl")
    if planned.stages[-2].kind == "online":
        assert [row["episode"] for row in trained] == [8.0, 16.0]
    assert trained[-1]["lr"] >= 0
    found = json.loads((planned.stage_folder(len(planned.stages) - 1) / "evaluation.json").read_text())
    assert len(found["models"]) == 2
    page, summary = report.write(folder)
    assert page.is_file()
    assert summary.is_file()

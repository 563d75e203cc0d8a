"""Reward models on people's preferences: the recipe runs from end to end, and judges nothing it was trained on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from palate.data.source import Data, load
from palate.live import Display
from palate.records import Demonstration, Ranking, Text, text_of
from palate.run import execute, plan_file

pytestmark = pytest.mark.data

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "real_rewards.yaml"
TASKS = ("polite", "helpful", "harmless")
SHRUNK = (
    "stages.reader.model={hidden_size: 16, layers: 1, heads: 2, vocabulary: 300, context: 448}",
    "stages.reader.data.rows=64",
    "stages.reader.encoding.max_length=32",
    *(f"stages.{task}.encoding={{max_length: 48, max_prompt_length: 16, long_prompts: keep_end}}" for task in TASKS),
    *(f"stages.judge_{task}.encoding.max_length=48" for task in TASKS),
    *(f"stages.judge_{task}.encoding.max_prompt_length=16" for task in TASKS),
    *(f"stages.{task}.data.rows=64" for task in TASKS),
    *(f"stages.judge_{task}.comparisons.rows=64" for task in TASKS),
    *(f"stages.{task}.num_train_epochs=1" for task in TASKS),
)
"""What makes the recipe a matter of seconds: overrides and nothing else, as one would type them."""


@pytest.fixture(scope="module", autouse=True)
def _data(palate_data: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALATE_DATA", str(palate_data))
        yield


def _stages() -> dict[str, Any]:
    return {stage.name: stage for stage in plan_file(RECIPE).stages}


def _sides(task: str) -> tuple[list[Ranking], list[Ranking]]:
    """What the recipe trains on, and what it judges on."""
    stages = _stages()
    judged: Data = stages[f"judge_{task}"].comparisons
    sides = load(stages[task].data, 1, "train"), load(judged, 1, "held_out")
    return tuple([r for r in side if isinstance(r, Ranking)] for side in sides)  # type: ignore[return-value]


def _prompts(records: list[Ranking]) -> set[str]:
    return {text_of(record.prompt) for record in records}


def _said(answer: Text) -> str:
    return answer if isinstance(answer, str) else answer[-1].content


@pytest.mark.parametrize("task", TASKS)
def test_training_and_held_side_share_no_prompt_and_lose_no_row(task: str) -> None:
    train, held = _sides(task)
    everything = load(_stages()[task].data, 1, "all")
    assert len(train) + len(held) == len(everything)
    assert not _prompts(train) & _prompts(held)
    assert 0.15 < len(held) / len(everything) < 0.35


def test_replies_of_one_tree_stay_on_one_side(palate_data: Path) -> None:
    with gzip.open(palate_data / "preference" / "oasst1_en_pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    tree = {(row["chosen"], row["rejected"]): row["tree"] for row in rows}
    train, held = ({tree[_texts(record)] for record in side} for side in _sides("helpful"))
    assert not train & held
    assert len(train | held) == len({row["tree"] for row in rows})


def _texts(record: Ranking) -> tuple[str, str]:
    best, worst = (_said(record.completions[record.ranks.index(rank)]) for rank in (0, 1))
    return best, worst


def _reading() -> list[Demonstration]:
    records = load(_stages()["reader"].data, 1, "all")
    return [record for record in records if isinstance(record, Demonstration)]


@pytest.mark.parametrize("task", TASKS)
def test_the_reader_never_saw_a_held_answer(task: str) -> None:
    """Verbatim, and of more than a greeting's length: people greet alike."""
    said = {_said(record.completion).strip() for record in _reading()}
    assert len(said) > 1000
    held = {_said(answer).strip() for record in _sides(task)[1] for answer in record.completions}
    assert not {text for text in held if len(text) > 60} & said


def test_the_recipe_runs_shrunk(tmp_path: Path) -> None:
    planned = plan_file(RECIPE, [*SHRUNK, f"output_dir={tmp_path}"])
    execute(planned, Display(Console(quiet=True)))
    folders = {stage.name: planned.stage_folder(index) for index, stage in enumerate(planned.stages)}
    for task in TASKS:
        found = json.loads((folders[f"judge_{task}"] / "evaluation.json").read_text(encoding="utf-8"))
        page = found["reward_models"][task]
        assert page["interval"]["low"] <= page["accuracy"] <= page["interval"]["high"]
        assert 0 <= page["calibration"]["error"] <= 1
        assert 0 <= page["longer_wins"] <= 1
        assert page["pairs"] + _pairs_trained(planned.stages, task) == 64


def _pairs_trained(stages: Any, task: str) -> int:
    data = next(stage.data for stage in stages if stage.name == task)
    return len(load(data, 1, "train"))

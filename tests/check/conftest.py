"""Recipes small enough to be checked in a second, and a small model on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from palate.check.found import RecipeFound
from palate.check.recipe import check_recipe
from palate.models.make import Make, make
from palate.models.save import Card, save
from tests.recipes.conftest import pantry  # noqa: F401  (a fixture)
from tests.recipes.shrunk import SHRUNK

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SIZES = {"hidden_size": 16, "layers": 1, "heads": 2, "vocabulary": 300, "context": 48}
Check = Callable[..., RecipeFound]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with its time and bytes."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


@pytest.fixture(scope="session")
def tasting() -> tuple[Path, list[str]]:
    """The tasting room, shrunk: the recipe and the words behind its name."""
    return RECIPES / "tasting_room.yaml", list(SHRUNK["tasting_room"])


@pytest.fixture(scope="session")
def seen(tasting: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> RecipeFound:
    """The shrunk tasting room, checked once with everything measured."""
    recipe, words = tasting
    folder = tmp_path_factory.mktemp("never")
    found = check_recipe(recipe, [*words, f"output_dir={folder}"], True, lambda text: None)
    assert list(folder.iterdir()) == []
    return found


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make(Make(**SIZES), [f"say {n}: {n}." for n in range(9)], 1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(folder, made.trunk, made.tokenizer, Card("tiny", "nothing"))
    return folder


@pytest.fixture
def checked(tmp_path: Path) -> Check:
    """A recipe of the stages given, checked without measuring unless asked."""

    def check(*stages: Mapping[str, Any], measure: bool = False, **common: Any) -> RecipeFound:
        recipe = tmp_path / "recipe.yaml"
        given = {"name": "small", "output_dir": str(tmp_path / "runs"), **common, "stages": list(stages)}
        recipe.write_text(yaml.safe_dump(given))
        return check_recipe(recipe, [], measure, lambda text: None)

    return check


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say {n}:", "completion": f" {n}."} for n in range(8)]
    return write_rows(tmp_path / "demonstrations.jsonl", rows)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say {n}:", "chosen": f" {n}.", "rejected": " no"} for n in range(8)]
    return write_rows(tmp_path / "pairs.jsonl", rows)


def sft(model: Any, data: Any, **more: Any) -> dict[str, Any]:
    stage = {"kind": "train", "name": "sft", "model": model, "data": data, "algorithm": {"kind": "sft"}}
    return {**stage, "batch_size": 4, "microbatch_size": 4, **more}


def reward(model: Any, data: Any, **more: Any) -> dict[str, Any]:
    return {**sft(model, data), "name": "reward", "algorithm": {"kind": "reward"}, **more}


def online(model: Any, judge: Any, prompts: Any, **more: Any) -> dict[str, Any]:
    stage = {"kind": "online", "name": "rlhf", "model": model, "reward": judge, "prompts": prompts}
    sizes = {"rollout_batch_size": 8, "microbatch_size": 4, "total_episodes": 16, "sampling": {"max_new_tokens": 6}}
    return {**stage, "algorithm": {"kind": "ppo", "num_ppo_epochs": 2, "num_mini_batches": 2}, **sizes, **more}

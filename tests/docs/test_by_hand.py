"""`docs/by_hand.py` and the library give the same numbers from the same dice."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from palate.live import Display
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.run import execute, plan

HERE = Path(__file__).resolve()
PROMPTS = [f"Say something about number {n}:" for n in range(16)]


def by_hand() -> ModuleType:
    spec = importlib.util.spec_from_file_location("by_hand", HERE.parents[2] / "docs" / "by_hand.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["by_hand"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward anyone can check: how many vowels, less how many spaces."""
    return [sum(c in "aeiou" for c in text) / 4 - text.count(" ") / 8 for text in completions]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make(Make(architecture="gpt2", hidden_size=32, layers=2, heads=2, vocabulary=280, context=64), PROMPTS, 11)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(folder, made.trunk, made.tokenizer, Card("tiny", "nothing"))
    return folder


def test_the_library_and_the_page_agree(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = by_hand()
    recipe = page.Recipe()
    policy, history = page.train(str(model), PROMPTS, lambda p, a: vowels([p], [a])[0], recipe)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    stage = {
        "kind": "online",
        "name": "ppo",
        "model": str(model),
        "reward": {"kind": "function", "function": vowels},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "shuffle": False},
        "algorithm": {"kind": "ppo", "num_mini_batches": recipe.minibatches},
        "sampling": {"max_new_tokens": recipe.longest},
        "optimiser": {"learning_rate": recipe.rate},
        "rollout_batch_size": recipe.answers,
        "total_episodes": recipe.answers * recipe.iterations,
        "microbatch_size": 3,
        "layout": {"value_init": "zero"},
    }
    done = execute(plan({"name": "same", "output_dir": str(tmp_path), "stages": [stage]}), Display(quiet=True))
    lines = (done.folder / "1-ppo" / "metrics.jsonl").read_text().splitlines()
    library = [json.loads(line) for line in lines]
    assert len(library) == recipe.iterations
    for ours, theirs in zip(library, history, strict=True):
        assert ours["objective/scores"] == pytest.approx(theirs["objective/scores"], abs=1e-6)
        assert ours["objective/kl"] == pytest.approx(theirs["objective/kl"], abs=2e-5)
    final = load_file(done.folder / "1-ppo" / "model" / "model.safetensors")
    start = load_file(model / "model.safetensors")
    gap = torch.cat([(final[n] - p.detach()).flatten() for n, p in policy.named_parameters() if n in final])
    moved = torch.cat([(final[n] - start[n]).flatten() for n in final])
    assert float(gap.abs().max()) < 1e-4
    assert float(moved.abs().max()) > 1e-3

"""Real stages on a model of a few thousand numbers: what the tests of this folder run, and how they look at it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from palate.live import Display
from palate.models.make import Architecture, Make, make
from palate.models.save import Card, save
from palate.parallel import World
from palate.run import execute, plan
from palate.settings import build
from palate.stages.online import Stage as OnlineStage
from palate.stages.online import _Loop as OnlineLoop  # pyright: ignore[reportPrivateUsage]
from palate.stopping import Stopper
from palate.workspace import Workspace

PROMPTS = [f"Number {n} is" for n in range(16)]


def vowels(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A reward that anyone can check."""
    return [sum(c in "aeiou" for c in text) / 4 - len(text) / 16 for text in completions]


def save_model(folder: Path, architecture: Architecture = "llama", width: float = 3.0) -> Path:
    """A random model whose distributions are far from uniform."""
    shape = Make(architecture=architecture, hidden_size=32, layers=2, heads=2, vocabulary=280, context=48)
    made = make(shape, PROMPTS, 11)
    for weight in made.trunk.parameters():
        if weight.dim() > 1:
            weight.data.mul_(width)
    save(folder, made.trunk, made.tokenizer, Card("tiny", "nothing"))
    return folder


def write_prompts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": p + " odd"}) + "\n" for p in PROMPTS))
    return path


def ppo(model: Path | str, prompts: Any, **changes: Any) -> dict[str, Any]:
    """Rollouts of 8 answers, two passes of two minibatches each."""
    algorithm = {"kind": "ppo", "num_ppo_epochs": 2, "num_mini_batches": 2, **changes.pop("algorithm", {})}
    found = {"kind": "online", "name": "ppo", "model": str(model), "prompts": prompts, "algorithm": algorithm}
    reward = {"kind": "function", "function": vowels}
    sizes = {"rollout_batch_size": 8, "microbatch_size": 4, "total_episodes": 48, "save_steps": 2, "sample_steps": 3}
    dice = {"sampling": {"max_new_tokens": 6}, "optimiser": {"learning_rate": 1e-3, "schedule": "constant"}}
    return {**found, "reward": reward, **sizes, **dice, **changes}


def sft(model: Path | str, data: Any, **changes: Any) -> dict[str, Any]:
    """Four steps an epoch."""
    found = {"kind": "train", "name": "sft", "model": str(model), "data": data, "algorithm": {"kind": "sft"}}
    sizes = {"batch_size": 4, "microbatch_size": 2, "logging_steps": 1, "num_train_epochs": 2, "save_steps": 2}
    return {**found, **sizes, "optimiser": {"learning_rate": 1e-3, "schedule": "constant"}, **changes}


def run(folder: Path, *stages: dict[str, Any], name: str = "tiny") -> Path:
    """The run directory of a run gone through to its end."""
    given = {"name": name, "output_dir": str(folder), "stages": list(stages)}
    return execute(plan(given), Display(quiet=True)).folder


def workspace(folder: Path, name: str) -> Workspace:
    """A stage's place without a run around it."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World()
    return Workspace(folder, name, 1, {}, world, Display(quiet=True), {}, {}, stopper=Stopper(world))


def online_loop(folder: Path, given: dict[str, Any], rate: float = 1.0) -> OnlineLoop:
    """The loop of an online stage before its first rollout."""
    stage = build("stages", given, "stages.0")
    assert isinstance(stage, OnlineStage)
    return OnlineLoop(stage, workspace(folder, stage.name), rate)


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def warnings(stage: Path) -> list[str]:
    """What a stage's user was warned of."""
    return [row["warning"] for row in lines(stage / "warnings.jsonl")]


def weights(stage: Path) -> dict[str, Tensor]:
    """The model that a stage left."""
    return load_file(stage / "model" / "model.safetensors")


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what the clock said."""
    return [{k: v for k, v in row.items() if k not in ("step_time", "tokens_per_second")} for row in rows]

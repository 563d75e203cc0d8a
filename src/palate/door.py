"""The Python door: `palate.train(...)`, `palate.sft(...)`, `palate.reward(...)`, `palate.load(...)`.

Each call of the first three is a run of one stage, with its folder under `runs/`; nothing is done here that a YAML
file could not ask for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from palate import randomness, ranks
from palate.data.encode import Encoding, encode_prompts
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.live import Display
from palate.models.load import Loaded
from palate.models.load import load as load_model
from palate.one_stage import OneStage
from palate.records import Prompt, Text, as_messages
from palate.run import Plan, execute, plan
from palate.settings import PalateError, parse
from palate.tracking import JsonLines

Rows = str | Path | Mapping[str, Any] | Sequence[Any]
_AT_ONCE = 64


class Trained:
    """A model on disk: what a run left behind, or any folder or hub id.

    `folder` is the model's folder (or hub id), `run` the run directory it came from, `metrics` the logged rows of the
    stage that made it, each with its `step`.
    """

    def __init__(self, folder: str, run: Path | None = None, sampling: Sampling | None = None) -> None:
        self.folder = folder
        self.run = run
        self.metrics = JsonLines(Path(folder).parent / "metrics.jsonl").read() if run else []
        self._sampling = sampling or parse(Sampling, {})

    def generate(self, prompts: str | Sequence[Any], seed: int = 1, greedy: bool = False, **sampling: Any) -> list[str]:
        """One answer per prompt, as text. A prompt is a string or a list of `{role, content}` messages.

        `sampling` overrides the settings the model was trained with (temperature, max_new_tokens, …). The same
        prompt, seed and settings give the same answer, whatever the other prompts are.
        """
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        longest = {"max_new_tokens": min(self._sampling.max_new_tokens, max(self.loaded.trunk.context // 2, 1))}
        how = parse(Sampling, {**self._sampling.model_dump(), **longest, **sampling}, "sampling")
        return answers(self.loaded, [_text(p) for p in listed], how, seed, greedy)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Copy the model to a folder that transformers (or PEFT) and palate load."""
        source = Path(self.folder)
        if not source.is_dir():
            raise PalateError(f"{self.folder}: not a folder on this disk, so there is nothing to copy.")
        return Path(shutil.copytree(source, folder, dirs_exist_ok=True))

    @cached_property
    def loaded(self) -> Loaded:
        """The model in memory."""
        return load_model(self.folder)

    def __repr__(self) -> str:
        return f"Trained({self.folder!r})"


def answers(loaded: Loaded, prompts: Sequence[Text], sampling: Sampling, seed: int, greedy: bool) -> list[str]:
    """One answer per prompt, decoded without special tokens, in the order of the prompts."""
    room = max(loaded.trunk.context - sampling.max_new_tokens, 1)
    records = [Prompt(prompt) for prompt in prompts]
    rows = encode_prompts(records, loaded.tokenizer, Encoding(), room).rows
    engine = LocalEngine(loaded.trunk, loaded.tokenizer, sampling)
    texts: list[str] = []
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        keys = [randomness.key(seed, "generate", row.key) for row in part]
        found = engine.generate([row.tokens for row in part], keys, greedy=greedy)
        said = (tokens[mask].tolist() for tokens, mask in zip(found.tokens_BT, found.action_BT, strict=True))
        texts += [loaded.tokenizer.decode(ids) for ids in said]
    return texts


def train(
    model: Any, reward: Any, prompts: Rows, algorithm: str | Mapping[str, Any] = "ppo", **settings: Any
) -> Trained:
    """Train a policy on its own answers.

    `model`: a folder, hub id, `Trained`, or the settings of a model to make. `reward`: a function
    `f(prompts, completions, **columns) -> list[float | None]`, a reward model's folder or `Trained`, or a mapping
    with `kind`. `prompts`: a file, hub id, or a list of strings, message lists or rows. Every setting of the stage,
    its algorithm and its groups may be given by name; `name=` makes the run one that is continued and cached.
    """
    kind, more = _algorithm(algorithm)
    asked = {"model": _model(model), "reward": _model(reward), **more, **settings}
    return _run(OneStage("online", kind, kind), asked, {"prompts": prompts})


def sft(model: Any, data: Rows, **settings: Any) -> Trained:
    """Supervised fine-tuning on demonstrations: a file, hub id, or a list of rows in any known format."""
    return _run(OneStage("train", "sft", "sft"), {"model": _model(model), **settings}, {"data": data})


def reward(model: Any, data: Rows, **settings: Any) -> Trained:
    """A reward model from preferences: a file, hub id, or a list of rows such as `{prompt, chosen, rejected}`."""
    return _run(OneStage("train", "reward", "reward"), {"model": _model(model), **settings}, {"data": data})


def load(path: str | Path) -> Trained:
    """A model from its folder or hub id, or the last model of a run directory."""
    folder = Path(path).expanduser()
    if not (folder / "resolved.yaml").exists():
        return Trained(str(path) if not folder.exists() else str(folder))
    made = sorted(folder.glob("*-*/model"), key=lambda f: int(f.parent.name.partition("-")[0]))
    if not made:
        raise PalateError(f"{folder}: no stage of this run has left a model yet.")
    return Trained(str(made[-1]), folder)


def _run(shape: OneStage, asked: Mapping[str, Any], data: Mapping[str, Rows]) -> Trained:
    """Write the rows that were given as values, run the stage, and hold what came of it."""
    home = Path(str(asked.get("output_dir", "runs"))).expanduser()
    name = str(asked.get("name") or _next_name(home, shape.name))
    files = {key: _file(rows, home / name / f"{key}.jsonl") for key, rows in data.items()}
    given = shape.given({**asked, **files, "name": name})
    planned = plan(given, source="python")
    execute(planned, Display(quiet=ranks.rank() > 0), ["python", f"palate.{shape.name}"])
    return _trained(planned)


def _trained(planned: Plan) -> Trained:
    stage = planned.stages[-1]
    sampling = getattr(stage, "sampling", None)
    folder = planned.stage_folder(len(planned.stages) - 1) / "model"
    return Trained(str(folder), planned.folder, sampling if isinstance(sampling, Sampling) else None)


def _next_name(home: Path, stem: str) -> str:
    """The first of stem-1, stem-2, … that is not there yet: without a name, each call is a run of its own."""
    number = 1
    while (home / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def _file(rows: Rows, path: Path) -> Any:
    """Rows given as values become a file of the run directory; anything else is left as it is."""
    if isinstance(rows, str | Path):
        return str(rows)
    if isinstance(rows, Mapping):
        return dict(rows)
    lines = [json.dumps(_row(row), ensure_ascii=False) + "\n" for row in rows]
    if not lines:
        raise PalateError(f"{path.stem}: the list is empty. Give at least one row.")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{ranks.rank()}")  # every rank writes the same rows
    fresh.write_text("".join(lines), encoding="utf-8")
    os.replace(fresh, path)
    return str(path)


def _row(row: Any) -> Any:
    return row if isinstance(row, Mapping) else {"prompt": row}


def _text(prompt: Any) -> Text:
    return prompt if isinstance(prompt, str) else as_messages(prompt)


def _model(given: Any) -> Any:
    if isinstance(given, Trained):
        return given.folder
    return str(given) if isinstance(given, Path) else given


def _algorithm(given: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    return str(given.get("kind", "")), {"algorithm": dict(given)}

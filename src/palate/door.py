"""The Python door: `palate.train(...)`, `palate.sft(...)`, `palate.reward(...)`, `palate.load(...)`.

Each call of the first three is a run of one stage, with its folder under `runs/`; nothing is done here that a YAML
file could not ask for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from palate import randomness, ranks
from palate.data.encode import Encoding, encode_prompts
from palate.door_rows import Rows, demonstrations, is_dialogue, write_rows
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.engines.steering import Steer, Steering
from palate.live import Display
from palate.models.load import Loaded
from palate.models.load import load as load_model
from palate.one_stage import OneStage
from palate.records import Prompt, Text, as_messages, before_stop, text_of
from palate.run import Plan, execute, plan
from palate.settings import PalateError, parse
from palate.tracking import JsonLines

_AT_ONCE = 64


class Trained:
    """A model on disk: what a run left behind, or any folder or hub id.

    `folder` is the model's folder (or hub id), `run` the run directory it came from, `metrics` the logged rows of the
    stage that made it, each with its `step`, `evaluation` what became of `eval_prompts`.
    """

    def __init__(self, folder: str, run: Path | None = None, sampling: Sampling | None = None) -> None:
        self.folder = folder
        self.run = run
        self.metrics = JsonLines(Path(folder).parent / "metrics.jsonl").read() if run else []
        self.evaluation: list[dict[str, Any]] = []
        self._sampling = sampling or parse(Sampling, {})

    def generate(
        self,
        prompts: str | Sequence[Any],
        seed: int = 1,
        greedy: bool = False,
        *,
        beta: float = 0.0,
        legal_bigrams: Sequence[tuple[int, int]] = (),
        **sampling: Any,
    ) -> list[str]:
        """One answer per prompt, as text. A prompt is a string or a list of `{role, content}` messages.

        `sampling` overrides the settings the model was trained with (temperature, max_new_tokens, …). The same
        prompt, seed and settings give the same answer, whatever the other prompts are. `beta` steers by the values that
        the model learnt of its actions, `legal_bigrams` names the pairs of tokens that may follow one another.
        """
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        longest = {"max_new_tokens": min(self._sampling.max_new_tokens, max(self.loaded.trunk.context // 2, 1))}
        how = parse(Sampling, {**self._sampling.model_dump(), **longest, **sampling}, "sampling")
        steering = parse(Steering, {"beta": beta, "legal_bigrams": legal_bigrams}, "steering")
        if len(steering.betas) != 1:
            raise PalateError("steering.beta: one at a time here; the evaluate stage takes a list.")
        steer = Steer(self.loaded.trunk, self.loaded.heads, steering.betas[0], steering.legal_bigrams)
        return answers(self.loaded, [_text(p) for p in listed], how, seed, greedy, steer)

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


def answers(
    loaded: Loaded, prompts: Sequence[Text], sampling: Sampling, seed: int, greedy: bool, steer: Steer | None = None
) -> list[str]:
    """One answer per prompt, decoded without special tokens, in the order of the prompts."""
    room = max(loaded.trunk.context - sampling.max_new_tokens, 1)
    records = [Prompt(prompt) for prompt in prompts]
    rows = encode_prompts(records, loaded.tokenizer, Encoding(), room).rows
    engine = LocalEngine(loaded.trunk, loaded.tokenizer, sampling, steer=steer)
    texts: list[str] = []
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        keys = [randomness.key(seed, "generate", row.key) for row in part]
        found = engine.generate([row.tokens for row in part], keys, greedy=greedy)
        said = (tokens[mask].tolist() for tokens, mask in zip(found.tokens_BT, found.action_BT, strict=True))
        texts += [before_stop(loaded.tokenizer.decode(ids), sampling.stop) for ids in said]
    return texts


def train(
    model: Any,
    reward: Any = None,
    prompts: Rows | None = None,
    algorithm: str | Mapping[str, Any] | None = None,
    *,
    data: Rows | None = None,
    reward_fn: Any = None,
    samples: Rows | None = None,
    rewards: Sequence[float] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    metric_fn: Callable[..., Mapping[str, Sequence[float]]] | None = None,
    stop_sequences: Sequence[str] = (),
    **settings: Any,
) -> Trained:
    """Train a model by one algorithm. What is given decides which, where `algorithm` does not say.

    `reward` (or `reward_fn`) and `prompts`: a policy learns from its own answers, by PPO. `samples` and `rewards`: it
    learns from rated samples, by ILQL. `samples` alone: from samples, by SFT. `data`: what the named algorithm reads.

    `model`: a folder, hub id, `Trained`, or the settings of a model to make. `reward`: a function
    `f(prompts, completions, **columns) -> list[float | None]` or `f(samples, prompts, outputs, **columns)`, a reward
    model's folder or `Trained`, or a mapping with `kind`. `prompts`: a file, hub id, or a list of strings, message
    lists or rows, whose further columns reach the reward function. `samples`: texts, or dialogues
    `[prompt, output, …]`. `eval_prompts` are answered when training is over, and `metric_fn(samples, prompts,
    outputs)` looks at the answers; both are in `Trained.evaluation`. `stop_sequences` end an answer. Every setting of
    the stage, its algorithm and its groups may be given by name; `name=` makes the run one that is continued and
    cached.
    """
    found = _asked(reward if reward_fn is None else reward_fn, prompts, data, samples, rewards, algorithm)
    if reward is not None and reward_fn is not None:
        raise PalateError("reward and reward_fn are two names of one thing. Give one of them.")
    kind, more = _algorithm(found.algorithm)
    if samples is not None and is_dialogue(samples):
        more = {"encoding": {"turns": "plain"}, **more}
    if stop_sequences:
        more = {"stop": list(stop_sequences), **more}
    judged = {} if found.stage == "train" else {"reward": _model(found.reward)}
    asked = {"model": _model(model), **judged, **more, **settings}
    trained = _run(OneStage(found.stage, kind, kind), asked, found.rows)
    if eval_prompts is not None:
        trained.evaluation = evaluation(trained, eval_prompts, metric_fn)
    return trained


@dataclass(frozen=True)
class _Asked:
    """What a call of `train` comes to."""

    stage: str
    algorithm: str | Mapping[str, Any]
    rows: Mapping[str, Rows]
    reward: Any = None


def _asked(
    reward: Any,
    prompts: Rows | None,
    data: Rows | None,
    samples: Rows | None,
    rewards: Sequence[float] | None,
    algorithm: str | Mapping[str, Any] | None,
) -> _Asked:
    """The stage, the algorithm and the rows; PalateError where what was given does not go together."""
    if reward is not None:
        if prompts is None or samples is not None or data is not None:
            raise PalateError("train: a reward goes with prompts, which the policy answers. Give prompts alone.")
        return _Asked("online", algorithm or "ppo", {"prompts": prompts}, reward)
    if rewards is not None and samples is None:
        raise PalateError("train: rewards go with samples. Give samples, or a function as reward.")
    if samples is not None and data is None and prompts is None:
        usual = "sft" if rewards is None else "ilql"
        return _Asked("train", algorithm or usual, {"data": demonstrations(samples, rewards)})
    if data is not None and algorithm is not None and samples is None and prompts is None:
        return _Asked("train", algorithm, {"data": data})
    raise PalateError(
        "train: give reward and prompts (the policy learns from its own answers), samples and rewards (rated samples), "
        "samples alone (imitation), or data and algorithm."
    )


def evaluation(
    trained: Trained, prompts: Sequence[Any], metric: Callable[..., Mapping[str, Sequence[float]]] | None = None
) -> list[dict[str, Any]]:
    """One row per prompt: the prompt, the answer, and what `metric(samples, prompts, outputs)` says of it.

    A prompt is a text or a mapping with `prompt`; its further columns are in the row and reach the metric as lists.
    """
    given = [dict(p) if isinstance(p, Mapping) else {"prompt": p} for p in prompts]
    asked = [one["prompt"] for one in given]
    said = trained.generate(asked)
    texts = [p if isinstance(p, str) else text_of(as_messages(p)) for p in asked]
    rows = [{**one, "output": answer} for one, answer in zip(given, said, strict=True)]
    if metric is None:
        return rows
    columns = {name: [one.get(name) for one in given] for name in given[0] if name != "prompt"}
    samples = [prompt + answer for prompt, answer in zip(texts, said, strict=True)]
    measured = metric(samples=samples, prompts=texts, outputs=said, **columns)
    for name, values in measured.items():
        if len(values) != len(rows):
            raise PalateError(f"metric_fn: {name!r} has {len(values)} values for {len(rows)} answers. Give one each.")
    return [{**row, **{name: values[i] for name, values in measured.items()}} for i, row in enumerate(rows)]


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
    files = {key: write_rows(rows, home / name / f"{key}.jsonl") for key, rows in data.items()}
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

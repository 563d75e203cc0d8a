"""What users get wrong, end to end: one clear error that names place, fault and next move; exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from palate.live import Display
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.run import execute, plan
from palate.settings import PalateError

SHORT = {"kind": "length", "at_most": 20}
PROMPTS = [f"Number {n}:" for n in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make(Make(hidden_size=32, layers=1, heads=2, vocabulary=280, context=32), PROMPTS, 1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(folder, made.trunk, made.tokenizer, Card("tiny", "nothing"))
    return folder


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": " yes"}) + "\n" for p in PROMPTS))
    return path


def run(tmp_path: Path, *stages: dict[str, Any], **changes: Any) -> None:
    given = {"name": "bad", "output_dir": str(tmp_path / "runs"), "stages": list(stages), **changes}
    execute(plan(given), Display(quiet=True))


def sft(model: Path | dict[str, Any], data: Any, **changes: Any) -> dict[str, Any]:
    where = str(model) if isinstance(model, Path) else model
    found = {"kind": "train", "name": "sft", "model": where, "data": data, "algorithm": {"kind": "sft"}}
    return {**found, "batch_size": 4, **changes}


def ppo(model: Path, data: Any, reward: Any, **changes: Any) -> dict[str, Any]:
    found = {"kind": "online", "name": "ppo", "model": str(model), "prompts": data, "reward": reward}
    sizes = {"rollout_batch_size": 4, "total_episodes": 4, "sampling": {"max_new_tokens": 4}}
    return {**found, "algorithm": {"kind": "ppo"}, **sizes, **changes}


def too_few(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0]


def broken(prompts: list[str], completions: list[str]) -> list[float]:
    raise KeyError("colour")


CASES: dict[str, tuple[Any, str]] = {
    "misspelt algorithm setting": (
        lambda m, d: sft(m, str(d), algorithm={"kind": "sft", "averge": "token"}),
        r"stages\.0\.algorithm.*there is no setting 'averge'\. Did you mean 'average'",
    ),
    "misspelt algorithm": (
        lambda m, d: sft(m, str(d), algorithm={"kind": "stf"}),
        r"stages\.0\.algorithm.*no algorithm is called 'stf'\. Did you mean 'sft'",
    ),
    "wrong type": (lambda m, d: sft(m, str(d), batch_size="many"), r"stages\.0\.batch_size: .*integer.*'many'"),
    "missing data file": (lambda m, d: sft(m, str(d) + "x"), r"no such file.*Did you mean 'demos\.jsonl'"),
    "missing model": (lambda m, d: sft(Path("/nowhere/model"), str(d)), r"/nowhere/model: no such folder"),
    "a batch larger than the data": (lambda m, d: sft(m, str(d), batch_size=64), r"8 rows do not fill one batch of 64"),
    "prompts longer than the context": (
        lambda m, d: ppo(m, {"path": str(d)}, SHORT, sampling={"max_new_tokens": 31}),
        r"record 0 .*the prompt has \d+ tokens, 1 fit",
    ),
    "a rollout that minibatches do not divide": (
        lambda m, d: ppo(m, str(d), SHORT, algorithm={"kind": "ppo", "num_mini_batches": 3}),
        r"rollout_batch_size 4 is not divisible by 3",
    ),
    "truncated sampling in training": (
        lambda m, d: ppo(m, str(d), SHORT, sampling={"top_p": 0.9}),
        r"sampling\.top_p: 0\.9 draws from a part of the vocabulary",
    ),
    "a penalty that no answer can escape": (
        lambda m, d: ppo(
            m, str(d), SHORT, sampling={"max_new_tokens": 4, "fixed_length": True}, shaping={"missing_eos_penalty": -1}
        ),
        r"stages\.0: shaping\.missing_eos_penalty: fixed_length answers never end",
    ),
    "reward function with the wrong count": (
        lambda m, d: ppo(m, str(d), {"kind": "function", "function": too_few}),
        r"(?s)too_few.*1 .*4",
    ),
    "reward function that raises": (
        lambda m, d: ppo(m, str(d), {"kind": "function", "function": broken}),
        r"(?s)broken.*KeyError.*colour",
    ),
    "reward stage missing": (
        lambda m, d: ppo(m, str(d), "stage:reward"),
        r"stages\.0.*'reward'",
    ),
    "a policy as reward model": (lambda m, d: ppo(m, str(d), str(m)), r"no trained reward head"),
    "demonstrations where rankings belong": (
        lambda m, d: sft(m, str(d), algorithm={"kind": "reward"}),
        r"expected ranked answers, got a demonstration",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fault_is_named(name: str, model: Path, demonstrations: Path, tmp_path: Path) -> None:
    stage, message = CASES[name]
    with pytest.raises(PalateError, match=message):
        run(tmp_path, stage(model, demonstrations))


def test_model_folder_without_weights_and_with_pickle(model: Path, demonstrations: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (empty / name).write_bytes((model / name).read_bytes())
    with pytest.raises(PalateError, match="no weights"):
        run(tmp_path, sft(empty, str(demonstrations)))
    torch.save({"x": torch.zeros(1)}, empty / "pytorch_model.bin")
    with pytest.raises(PalateError, match=r"pickle.*allow_pickle"):
        run(tmp_path, sft(empty, str(demonstrations)))


def test_empty_dataset_and_malformed_line(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(PalateError, match=r"rows\.jsonl"):
        run(tmp_path, sft(model, str(path)))
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    with pytest.raises(PalateError, match=r"rows\.jsonl:2: .*JSON"):
        run(tmp_path, sft(model, str(path)))


def test_bad_rows_are_skipped_told_and_written_aside(model: Path, demonstrations: Path, tmp_path: Path) -> None:
    """Counted over every source of the stage, told once, and the same after the stage starts again."""
    good = demonstrations.read_text()
    path = tmp_path / "torn.jsonl"
    path.write_text(good + '{"prompt": "a", \n' + '{"prompt": "a", "completion": 7}\n')
    stage = sft(model, {"path": str(path), "on_bad_row": "skip", "held_out": 0.3})
    folder = tmp_path / "runs" / "bad" / "1-sft"
    for _ in range(2):
        run(tmp_path, stage)
        rows = [json.loads(line) for line in (folder / "skipped_rows.jsonl").read_text().splitlines()]
        assert [(row["place"], row["row"]) for row in rows] == [
            (f"{path}:9", '{"prompt": "a", '),
            (f"{path}:10", {"prompt": "a", "completion": 7}),
        ]
        assert rows[1]["fault"].startswith("completion: expected text or a list of turns, got int 7")
        (folder / "DONE").unlink()
    said = [json.loads(line)["warning"] for line in (folder / "warnings.jsonl").read_text().splitlines()]
    assert f"2 of 10 rows of {path} were skipped, the first: {path}:9: not JSON" in said[0]
    assert said[0].endswith(f"they are in {folder / 'skipped_rows.jsonl'}")
    assert len([text for text in said if "skipped" in text]) == 2, "once a start"


def test_the_command_says_it_once_and_exits_with_2(model: Path, demonstrations: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    stage = sft(model, str(demonstrations), batch_sise=4)
    recipe.write_text(yaml.safe_dump({"name": "bad", "output_dir": str(tmp_path / "runs"), "stages": [stage]}))
    done = subprocess.run([sys.executable, "-m", "palate", "run", str(recipe)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no setting 'batch_sise'. Did you mean 'batch_size'?" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "runs" / "bad" / "1-sft").exists()

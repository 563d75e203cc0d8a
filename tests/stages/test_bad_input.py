"""What users get wrong, end to end: one clear error that names place, fault and next move; exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from palate.cli import main
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


def undecided(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("nan")] * len(completions)


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
    "reward function that says nan": (
        lambda m, d: ppo(m, str(d), {"kind": "function", "function": undecided}),
        r"undecided: nan for answer 0 .*not a finite number\. Return a number",
    ),
    "a GPU that is not there": (
        lambda m, d: sft(m, str(d), loading={"device": "cuda:99"}),
        r"stages\.0\.loading\.device: .*cuda:99",
    ),
    "a device that is none": (
        lambda m, d: ppo(m, str(d), SHORT, loading={"device": "gpu"}),
        r"stages\.0\.loading\.device: no device is called 'gpu'\. Write auto, cpu, cuda or cuda:N",
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


REWARDS = """
def raises(prompts, completions):
    raise KeyError("colour")

def too_few(prompts, completions):
    return [1.0]

def undecided(prompts, completions):
    return [float("nan")] * len(completions)
"""


@pytest.fixture
def here(model: Path, demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that can be wrong."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(model, tmp_path / "endless")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (tmp_path / "endless" / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    shutil.copytree(model, tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tmp_path / "hollow", tmp_path / "pickled")
    torch.save({"x": torch.zeros(1)}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text(demonstrations.read_text() + '{"prompt": "a", \n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a long story " * 40}) + "\n")
    (tmp_path / "judges.py").write_text(REWARDS)
    return tmp_path


SFT = "sft model=model data=demos.jsonl batch_size=4"
PPO = "ppo model=model prompts=demos.jsonl rollout_batch_size=4 total_episodes=4 max_new_tokens=4"
COMMANDS = {
    "misspelt key": (f"{SFT} batch_sise=4", "there is no setting 'batch_sise'. Did you mean 'batch_size'?"),
    "wrong type": (f"{SFT} num_train_epochs=often", "num_train_epochs: Input should be a valid integer"),
    "missing recipe": ("run nowhere.yaml", "nowhere.yaml: no such file. `palate list recipes` shows"),
    "missing data": (f"{SFT} data=demo.jsonl", "demo.jsonl: no such file or folder. Did you mean 'demos.jsonl'?"),
    "missing model": (
        f"{SFT} model={{here}}/modle",
        "/modle: no such folder. Did you mean 'model'? Give a model folder",
    ),
    "missing model or hub id": (f"{SFT} model=modle", "modle: neither a folder nor a model the hub gave us: "),
    "malformed line": (f"{SFT} data=torn.jsonl", "torn.jsonl:9: not JSON: "),
    "empty data": (f"{SFT} data=empty.jsonl", "empty.jsonl: holds no rows. Give a file with at least one."),
    "reward that raises": (f"{PPO} reward=judges.py:raises", "raised KeyError: 'colour' (at judges.py:3) for answer 0"),
    "reward of a wrong count": (f"{PPO} reward=judges.py:too_few", "returned 1 results for 4 answers"),
    "reward of nan": (f"{PPO} reward=judges.py:undecided", "nan for answer 0 "),
    "reward that is not there": (f"{PPO} reward=judges.py:raise", "Did you mean 'raises'?"),
    "long prompt": (
        f"{PPO} reward=judges.py:raises prompts=long.jsonl",
        "tokens, 28 fit. Set long_prompts to keep_end",
    ),
    "no end token": (f"{PPO} reward=judges.py:raises model=endless", "it has no end-of-sequence token. Name one that"),
    "reward stage missing": (f"{PPO} reward=stage:judge", "reads 'stage:judge', but no stage before it has that name"),
    "no weights": (f"{SFT} model=hollow", "hollow: no weights (*.safetensors) here. Give the folder"),
    "pickle": (f"{SFT} model=pickled", "pickled: the weights are pickle files (.bin), which can run any code"),
    "no such GPU": (f"{SFT} device=cuda:99", "loading.device: "),
    "no such device": (f"{PPO} reward=judges.py:raises device=gpu", "loading.device: no device is called 'gpu'. Write"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_says_it_in_one_line_and_leaves_nothing_half_written(name: str, here: Path) -> None:
    words, expected = COMMANDS[name]
    before = {path.name for path in here.iterdir()}
    done = CliRunner().invoke(
        main, [*words.format(here=here).split(), *([] if words.startswith("run") else ["name=bad"])]
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("palate: ")]
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert len(said) == 1, done.stderr
    assert expected in said[0]
    assert {path.name for path in here.iterdir()} - before <= {"runs", "__pycache__"}
    made = [path for path in here.glob("runs/bad/*-*/**/*") if path.is_file()]
    assert {path.name for path in made} <= {".started", "stage.yaml", "warnings.jsonl"}, "nothing to mistake for work"


def test_the_command_says_it_once_and_exits_with_2(model: Path, demonstrations: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    stage = sft(model, str(demonstrations), batch_sise=4)
    recipe.write_text(yaml.safe_dump({"name": "bad", "output_dir": str(tmp_path / "runs"), "stages": [stage]}))
    done = subprocess.run([sys.executable, "-m", "palate", "run", str(recipe)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no setting 'batch_sise'. Did you mean 'batch_size'?" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "runs" / "bad" / "1-sft").exists()

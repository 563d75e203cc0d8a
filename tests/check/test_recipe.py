"""A whole recipe: every kind of stage is set up, every fault is named, and nothing is left behind."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palate.check.found import RecipeFound, document
from palate.check.recipe import check_recipe
from palate.live import Display
from palate.run import execute, plan_file
from palate.settings import PalateError
from tests.check.conftest import RECIPES, SIZES, Check, contents, online, reward, sft, write_rows
from tests.recipes.shrunk import SHRUNK

SHORT = {"kind": "length", "at_most": 20}


def test_every_kind_of_stage_is_set_up(seen: RecipeFound) -> None:
    assert [(stage.name, stage.kind, stage.state.what) for stage in seen.stages] == [
        ("sft", "train", "new"),
        ("reward", "train", "new"),
        ("ppo", "online", "new"),
        ("evaluate", "evaluate", "new"),
    ]
    assert seen.all_faults == ()
    for stage in seen.stages:
        assert stage.seen.batches is not None
        assert stage.seen.examples
        assert stage.seen.time is not None
        assert stage.seen.time.total == pytest.approx(sum(stage.seen.time.seconds.values()))
    assert seen.seconds is not None
    assert seen.seconds > 0


def test_every_value_has_its_origin(seen: RecipeFound) -> None:
    origins = {s.name: s.origin for s in seen.stages[0].settings}
    assert origins["batch_size"] == "file"
    assert origins["model.hidden_size"] == "command line"
    assert origins["num_train_epochs"] == "default"
    common = {s.name: (s.value, s.origin) for s in seen.settings}
    assert common["seed"] == (1, "file")
    assert "stages" not in common


def test_the_document_is_json_and_says_everything(seen: RecipeFound) -> None:
    found = json.loads(json.dumps(document("recipe", seen, healthy=True), default=str))
    assert found["what"] == "recipe"
    assert len(found["stages"]) == 4
    stage = found["stages"][2]
    assert set(stage) == {"number", "name", "kind", "state", "settings", "seen"}
    keys = {"model", "batches", "examples", "batch", "rules", "memory", "time", "warnings", "faults"}
    assert set(stage["seen"]) == keys
    assert stage["seen"]["batches"]["numbers"]["optimiser_steps"] == 16
    assert len(stage["seen"]["examples"][0]["ids"]) == len(stage["seen"]["examples"][0]["trained"])


def test_a_run_directory_is_not_touched(model: Path, demonstrations: Path, checked: Check, tmp_path: Path) -> None:
    stages = [sft(str(model), str(demonstrations)), reward("stage:sft", str(demonstrations).replace("demon", "x"))]
    checked(*stages[:1])
    execute(plan_file(tmp_path / "recipe.yaml"), Display(quiet=True))
    before, scratch = contents(tmp_path / "runs"), set(Path(tempfile.gettempdir()).glob("palate-check-*"))
    found = checked(*stages[:1], measure=True)
    assert contents(tmp_path / "runs") == before
    assert set(Path(tempfile.gettempdir()).glob("palate-check-*")) - scratch == set()
    assert found.stages[0].state.what == "done"
    assert found.stages[0].seen.time is None  # nothing to spend on what is done
    assert found.seconds == 0.0


def test_what_is_left_of_a_stopped_stage(model: Path, demonstrations: Path, checked: Check, tmp_path: Path) -> None:
    checked(sft(str(model), str(demonstrations), num_train_epochs=2))
    plan = plan_file(tmp_path / "recipe.yaml")
    execute(plan, Display(quiet=True))
    (plan.stage_folder(0) / "DONE").unlink()
    (plan.stage_folder(0) / "checkpoints" / "step-00000003").mkdir(parents=True)
    (stage,) = checked(sft(str(model), str(demonstrations), num_train_epochs=2), measure=True).stages
    assert stage.seen.time is not None
    set_up, steps = (stage.seen.time.seconds[name] for name in ("setting up", "optimiser steps"))
    assert stage.seconds_left == pytest.approx(set_up + steps / 4)


def test_a_trained_stage_is_read_where_it_is(model: Path, demonstrations: Path, checked: Check, tmp_path: Path) -> None:
    """A later stage starts from the real model of a stage that is done."""
    first = sft(str(model), str(demonstrations))
    later = online("stage:sft", SHORT, str(demonstrations))
    assert "(not trained yet)" in checked(first, later).stages[1].seen.model
    checked(first)
    execute(plan_file(tmp_path / "recipe.yaml"), Display(quiet=True))
    assert "(not trained yet)" not in checked(first, later).stages[1].seen.model


Case = Callable[[str, Path, Path, Path], list[dict[str, Any]]]


def _padded(folder: Path) -> str:
    return str(write_rows(folder / "padded.jsonl", [{"prompt": "say", "chosen": " a<pad>", "rejected": " b"}] * 4))


FAULTS: dict[str, tuple[Case, str]] = {
    "fewer rows than a batch": (
        lambda m, d, p, t: [sft(m, str(d), batch_size=64)],
        "sft: 8 rows do not fill one batch of 64. Lower batch_size or bring more data.",
    ),
    "no trained token": (
        lambda m, d, p, t: [sft(m, str(d), encoding={"max_length": 2})],
        "sft: no record is left to train on: 8 rows without a trained token",
    ),
    "reward on padding": (
        lambda m, d, p, t: [reward(m, _padded(t), encoding={"eos": False})],
        "reward: data: 4 of 8 answers end in the padding token <pad>, so their reward would be read on padding.",
    ),
    "no such file": (lambda m, d, p, t: [sft(m, str(d) + "x")], "no such file or folder. Did you mean"),
    "no such model": (lambda m, d, p, t: [sft("/nowhere/m", str(d))], "sft: /nowhere/m: no such folder"),
    "a prompt that leaves no room": (
        lambda m, d, p, t: [online(m, SHORT, str(d), sampling={"max_new_tokens": 46})],
        "rlhf: record 0 ('say",
    ),
    "answers as long as the context": (
        lambda m, d, p, t: [online(m, SHORT, str(d), sampling={"max_new_tokens": 48})],
        "rlhf: sampling.max_new_tokens: 48 leaves no place for a prompt in the context of 48.",
    ),
    "a policy as reward model": (lambda m, d, p, t: [online(m, m, str(d))], "no trained reward head here"),
    "demonstrations for a reward model": (
        lambda m, d, p, t: [reward(m, str(d))],
        "expected ranked answers, got a demonstration record",
    ),
    "a malformed row": (
        lambda m, d, p, t: [sft(m, str(_torn(t)))],
        "torn.jsonl:2",
    ),
    "minibatches that do not divide": (
        lambda m, d, p, t: [online(m, SHORT, str(d), algorithm={"kind": "ppo", "num_mini_batches": 3})],
        "stages.0: rollout_batch_size 8 is not divisible by 3 minibatches.",
    ),
}


def _torn(folder: Path) -> Path:
    path = folder / "torn.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    return path


@pytest.mark.parametrize("name", FAULTS)
def test_nonsense_is_refused_by_name(
    name: str, model: Path, demonstrations: Path, pairs: Path, tmp_path: Path, checked: Check
) -> None:
    make, message = FAULTS[name]
    (fault,) = checked(*make(str(model), demonstrations, pairs, tmp_path)).all_faults
    assert message in fault
    assert "\n" not in fault


def test_faults_of_all_stages_are_gathered(model: Path, demonstrations: Path, pairs: Path, checked: Check) -> None:
    found = checked(
        sft(str(model), str(demonstrations), batch_size=64),
        reward("stage:sft", str(pairs), batch_size=32),
        online("stage:sft", "stage:reward", str(demonstrations) + "x"),
    )
    assert [fault.partition(":")[0] for fault in found.all_faults] == ["sft", "reward", "rlhf"]


def test_settings_of_all_stages_are_read(model: Path, demonstrations: Path, checked: Check) -> None:
    found = checked(
        sft(str(model), str(demonstrations), batch_sise=64), online(str(model), SHORT, "x", samplign={"top_p": 1})
    )
    assert [fault.partition(":")[0] for fault in found.all_faults] == ["stages.0", "stages.1"]
    assert "Did you mean 'batch_size'?" in found.all_faults[0]


def test_what_reads_a_faulty_stage_is_not_blamed(demonstrations: Path, checked: Check) -> None:
    found = checked(sft("/nowhere/m", str(demonstrations)), online("stage:sft", SHORT, str(demonstrations)))
    assert len(found.all_faults) == 1
    assert found.stages[1].seen.rules == ("not looked at: it reads stage 'sft', which has a fault",)


def test_a_recipe_without_stages_is_no_recipe(checked: Check) -> None:
    with pytest.raises(PalateError, match="stages"):
        checked()


def _many(folder: Path, count: int) -> str:
    rows = [{"prompt": f"say {n}:", "completion": f" {n}."} for n in range(count)]
    return str(write_rows(folder / "many.jsonl", rows))


WARNINGS: dict[str, tuple[Case, str]] = {
    "rows left out of an epoch": (
        lambda m, d, p, t: [sft(m, _many(t, 7), batch_size=4)],
        "3 of 7 rows fill no batch",
    ),
    "a micro-batch larger than the batch": (
        lambda m, d, p, t: [sft(m, str(d), microbatch_size=8)],
        "microbatch_size: 8 is larger than batch_size 4",
    ),
    "a micro-batch larger than a minibatch": (
        lambda m, d, p, t: [online(m, SHORT, str(d), microbatch_size=8)],
        "microbatch_size: 8 is larger than the 4 answers of one step",
    ),
    "no end is trained": (
        lambda m, d, p, t: [sft(m, str(d), encoding={"eos": False})],
        "no end token is trained in any row",
    ),
    "most rows are cut": (
        lambda m, d, p, t: [sft(m, str(d), encoding={"max_length": 5})],
        "8 of 8 rows are cut at 5 tokens",
    ),
    "begin token twice": (
        lambda m, d, p, t: [
            sft(m, str(write_rows(t / "bos.jsonl", [{"prompt": "<bos>a", "completion": " b<bos>"}] * 4)))
        ],
        "hold the begin token more than once",
    ),
    "padding as text": (
        lambda m, d, p, t: [sft(m, str(write_rows(t / "pad.jsonl", [{"prompt": "a<pad>", "completion": " b"}] * 4)))],
        "4 of 4 rows hold the padding token <pad> as text",
    ),
    "records left out": (
        lambda m, d, p, t: [sft(m, _many(t, 12), encoding={"long_rows": "drop", "max_length": 9})],
        "left out 2 of 12 records: 2 rows longer than 9 tokens",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_oddities_are_warnings(
    name: str, model: Path, demonstrations: Path, pairs: Path, tmp_path: Path, checked: Check
) -> None:
    make, message = WARNINGS[name]
    found = checked(*make(str(model), demonstrations, pairs, tmp_path))
    assert found.all_faults == ()
    assert any(message in warning for warning in found.all_warnings), found.all_warnings


def test_one_end_among_cut_rows_is_enough(model: Path, checked: Check, tmp_path: Path) -> None:
    rows = [{"prompt": "say 1:", "completion": " 1." * 9}] * 4 + [{"prompt": "say 1:", "completion": " 1."}] * 4
    found = checked(sft(str(model), str(write_rows(tmp_path / "long.jsonl", rows)), encoding={"max_length": 12}))
    assert found.all_warnings == ()


def test_a_healthy_recipe_has_neither(model: Path, demonstrations: Path, pairs: Path, checked: Check) -> None:
    found = checked(
        sft(str(model), str(demonstrations)),
        reward("stage:sft", str(pairs)),
        online("stage:sft", "stage:reward", str(demonstrations)),
        measure=True,
    )
    assert found.all_faults == ()
    assert found.all_warnings == ()


def test_quick_measures_nothing(model: Path, demonstrations: Path, checked: Check, tmp_path: Path) -> None:
    """A reward that raises is found by measuring; `--quick` asks it nothing."""
    (tmp_path / "raising.py").write_text("def raises(prompts, completions, **columns):\n    raise KeyError('colour')\n")
    stage = online(str(model), {"kind": "function", "function": f"{tmp_path}/raising.py:raises"}, str(demonstrations))
    quick = checked(stage)
    assert quick.all_faults == ()
    assert quick.stages[0].seen.time is None
    assert quick.stages[0].seen.memory is not None
    assert "activations" not in quick.stages[0].seen.memory.bytes
    (fault,) = checked(stage, measure=True).all_faults
    assert "colour" in fault


def test_a_reward_model_that_answers_do_not_fit_is_refused(
    model: Path, demonstrations: Path, pairs: Path, checked: Check
) -> None:
    """The policy made from the same texts has the reward model's tokenizer and a longer context."""
    (fault,) = checked(
        sft({**SIZES, "context": 64}, str(demonstrations)),
        reward(str(model), str(pairs)),
        online("stage:sft", "stage:reward", str(demonstrations), sampling={"max_new_tokens": 50}),
    ).all_faults
    assert "an answer up to 50; the reward model's context is 48" in fault


def test_a_reward_model_with_its_own_tokenizer_reads_text(
    model: Path, demonstrations: Path, pairs: Path, checked: Check
) -> None:
    stage = checked(
        sft({**SIZES, "vocabulary": 259}, str(demonstrations)),
        reward(str(model), str(pairs)),
        online("stage:sft", "stage:reward", str(demonstrations)),
        measure=True,
    ).stages[2]
    assert any("prompt and answer encoded anew by its own tokenizer" in rule for rule in stage.seen.rules)
    assert any(note.startswith("reward model is read at its token") for note in stage.seen.examples[0].notes)


def test_a_stage_of_ones_own_is_let_be(checked: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab_of_check.py").write_text(
        "from palate.settings import Choice\n\n\nclass Wait(Choice):\n"
        '    """Waits."""\n\n    name: str = "wait"\n    """Its name."""\n\n'
        "    def references(self):\n        return []\n\n    def files(self):\n        return []\n\n"
        "    def run(self, here):\n        raise AssertionError\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (stage,) = checked({"kind": "lab_of_check:Wait"}, measure=True).stages
    assert "a stage of your own" in stage.seen.rules[0]


@pytest.mark.parametrize("recipe", ["reward_hacking", "presets/tldr", "helpful_harmless"])
def test_other_recipes_are_healthy(recipe: str, pantry: dict[str, str], tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path}"]
    for line in SHRUNK[recipe]:
        for name, folder in pantry.items():
            line = line.replace(f"{{{name}}}", folder)
        words.append(line)
    found = check_recipe(RECIPES / f"{recipe}.yaml", words, True, lambda text: None)
    assert found.all_faults == ()
    assert all(stage.seen.memory for stage in found.stages)
    assert list(tmp_path.iterdir()) == []

"""The evaluation stage on real tiny models: what it leaves behind, what it refuses, and what must not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from palate.cast import Cast
from palate.diagnosis import report
from palate.live import Display
from palate.models.load import load
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.randomness import key
from palate.records import preference
from palate.run import execute, plan
from palate.settings import PalateError, build
from palate.stages import _answering
from palate.worlds import tasting_room

TEXTS = [r.prompt + r.completion for r in tasting_room.records("demonstrations", 60, 1)]
SMALL = Make(hidden_size=16, layers=1, heads=2, context=96, vocabulary=300)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models of one tokenizer and one of another, made from nothing."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "one": make(SMALL, TEXTS, key("one")),
        "two": make(SMALL, TEXTS, key("two")),
        "other": make(SMALL, ["quite another language"] * 20, key("other")),
    }
    for name, loaded in made.items():
        card = Card(title=name, base="nothing", data={}, settings={}, metrics={})
        save(folder / name, loaded.trunk, loaded.tokenizer, card)
    return {name: str(folder / name) for name in made}


def evaluate(tmp_path: Path, name: str = "trial", **settings: Any) -> tuple[Path, dict[str, Any]]:
    """Run one evaluate stage and read what it left."""
    stage = {"kind": "evaluate", "sampling": {"max_new_tokens": 8}, **settings}
    asked = {"name": name, "output_dir": str(tmp_path), "seed": 5, "stages": [stage]}
    folder = execute(plan(asked), Display(Console(quiet=True))).folder
    return folder, json.loads((folder / "1-evaluate" / "evaluation.json").read_text())


PROMPTS = {"path": "world:tasting_room/prompts", "rows": 6, "options": {"split": "test"}}
PAIRS = {"path": "world:tasting_room/pairs", "rows": 30, "options": {"split": "test"}}
GOLD = {"kind": "gold"}
SHORT = {"kind": "length", "at_most": 12}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_models_on_the_same_prompts(tmp_path: Path, models: dict[str, str]) -> None:
    folder, found = evaluate(
        tmp_path,
        models={"before": models["one"], "after": models["two"]},
        prompts=PROMPTS,
        rewards={"gold": GOLD, "length": SHORT},
        comparisons=PAIRS,
        answers=2,
    )
    assert (found["baseline"], found["judge"], found["gold"]) == ("before", "gold", "gold")
    assert (found["prompts"], found["answers"]) == (6, 2)
    before, after = found["models"]["before"], found["models"]["after"]
    assert before["win_rate"] == {}
    assert before["kl"] is None
    duel = after["win_rate"]["gold"]
    assert duel["wins"] + duel["ties"] + duel["losses"] == 12
    assert after["kl"]["answers"] == 12
    assert after["kl"]["mean"] != 0  # a sampled estimate between two untrained models: small, of either sign
    assert after["text"]["length_max"] <= 8
    assert 0 <= after["world"]["coverage"] <= 1
    page = found["reward_models"]["length"]
    assert page["pairs"] == 30
    assert page["truth"]["ceiling"] > 0.5
    assert "gold" not in found["reward_models"]
    rows = lines(folder / "1-evaluate" / "samples.jsonl")
    assert len(rows) == 6
    assert list(rows[0]["completions"]) == ["before", "after"]
    note = (rows[0]["prompt"], rows[0]["completions"]["after"])
    assert rows[0]["scores"]["after"]["gold"] == pytest.approx(tasting_room.utility(*note).total)
    assert rows[0]["parts"]["after"]["coverage"] == tasting_room.utility(*note).coverage
    metrics = lines(folder / "1-evaluate" / "metrics.jsonl")[0]
    assert metrics["evaluate/kl/after"] == pytest.approx(after["kl"]["mean"])
    page_path, _ = report.write(folder)
    assert "Before and after" in page_path.read_text()


def test_a_model_against_itself_ties_everywhere_at_no_distance(tmp_path: Path, models: dict[str, str]) -> None:
    """The same prompts, sampling and random keys for every model: its own twin says the very same."""
    _, found = evaluate(
        tmp_path, models={"a": models["one"], "b": models["one"]}, prompts=PROMPTS, rewards={"gold": GOLD}
    )
    twin = found["models"]["b"]
    assert twin["win_rate"]["gold"]["ties"] == 6
    assert twin["win_rate"]["gold"]["rate"]["p_value"] == 1
    assert twin["kl"]["mean"] == pytest.approx(0, abs=1e-5)


def test_batching_changes_nothing(tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"models": {"a": models["one"], "b": models["two"]}, "prompts": PROMPTS, "rewards": {"gold": GOLD}}
    _, whole = evaluate(tmp_path, "whole", **asked)
    monkeypatch.setattr(Cast, "budget", 1)  # a row at a time
    _, one_by_one = evaluate(tmp_path, "single", **asked)
    kl, other = whole["models"]["b"].pop("kl"), one_by_one["models"]["b"].pop("kl")
    assert whole == one_by_one
    assert kl["mean"] == pytest.approx(other["mean"], rel=1e-5)


def test_models_of_other_tokens_have_no_kl_and_say_so(tmp_path: Path, models: dict[str, str]) -> None:
    _, found = evaluate(
        tmp_path, models={"a": models["one"], "b": models["other"]}, prompts=PROMPTS, rewards={"gold": GOLD}
    )
    assert found["models"]["b"]["kl"] is None
    assert any("No KL for b" in note for note in found["notes"])


def test_demonstrations_bring_references_for_rouge(tmp_path: Path, models: dict[str, str]) -> None:
    data = {"path": "world:tasting_room/demonstrations", "rows": 4}
    asked = {"models": {"a": models["one"]}, "prompts": data, "rewards": {"gold": GOLD}}
    _, found = evaluate(tmp_path, "with", **asked)
    assert set(found["models"]["a"]["rouge"]) >= {"rouge1", "rouge2", "rougeL"}
    _, without = evaluate(tmp_path, "without", **asked, rouge=False)
    assert without["models"]["a"]["rouge"] is None


def test_held_out_prompts_are_the_held_out_side(tmp_path: Path, models: dict[str, str]) -> None:
    from palate.data.source import Data
    from palate.data.source import load as load_data

    data = {"path": "world:tasting_room/prompts", "rows": 30, "held_out": 0.3}
    folder, found = evaluate(tmp_path, models={"a": models["one"]}, prompts=data, rewards={"gold": GOLD})
    held = {record.prompt for record in load_data(Data(**data), 5, "held_out")}
    assert {row["prompt"] for row in lines(folder / "1-evaluate" / "samples.jsonl")} == held
    assert found["prompts"] == len(held)


def test_given_answers_keep_their_texts_and_mark_their_tokens(models: dict[str, str]) -> None:
    tokenizer = load(models["one"]).tokenizer
    pairs = [preference("Q: why?\nA:", " because", " ask me not")]
    from palate.data.encode import Encoding

    kept, answers, left_out = _answering.given_answers(pairs, tokenizer, Encoding())
    assert kept == pairs
    assert left_out == []
    assert answers.completions == [" because", " ask me not"]
    assert answers.prompts == ["Q: why?\nA:"] * 2
    for row in range(2):
        assert tokenizer.decode(answers.ids(row)) == answers.completions[row]
    assert answers.rollouts.finished_B.tolist() == [True, True]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({}, "nothing to evaluate"),
        ({"models": {"a": "x"}}, "models need prompts"),
        ({"prompts": PROMPTS}, "models need prompts"),
        ({"models": {"a": "x"}, "prompts": PROMPTS, "comparisons": PAIRS}, "comparisons are there to judge rewards"),
        ({"models": {"a": "x"}, "prompts": PROMPTS, "rewards": {"gold": GOLD}, "judge": "glod"}, "Did you mean 'gold'"),
        ({"models": {"a": "x"}, "prompts": PROMPTS, "rewards": {"gold": GOLD}, "gold": "truth"}, "no reward is called"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_door(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(PalateError, match=fault):
        build("stages", {"kind": "evaluate", **settings}, "stages.0")


def test_prompts_that_do_not_fit_are_refused_by_name(tmp_path: Path, models: dict[str, str]) -> None:
    asked = {"models": {"a": models["one"]}, "prompts": PROMPTS, "rewards": {"gold": GOLD}}
    with pytest.raises(PalateError, match="tokens"):
        evaluate(tmp_path, **asked, sampling={"max_new_tokens": 90})


def test_references_are_the_stages_of_models_and_rewards() -> None:
    stage = build(
        "stages",
        {
            "kind": "evaluate",
            "models": {"sft": "stage:sft", "ppo": "stage:rlhf"},
            "prompts": PROMPTS,
            "rewards": {"proxy": {"kind": "model", "model": "stage:reward"}, "gold": GOLD},
        },
    )
    assert stage.references() == ["sft", "rlhf", "reward"]

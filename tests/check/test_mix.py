"""Texts learnt beside answers, and averages, before anything runs."""

from __future__ import annotations

from pathlib import Path

from tests.check.conftest import Check, online, write_rows

REWARD = {"kind": "length", "at_most": 20}


def test_the_mix_is_told_in_words_and_the_average_is_counted(checked: Check, model: Path, demonstrations: Path) -> None:
    mix = {"data": str(demonstrations), "coef": 0.9, "mode": "convex", "batch_size": 4}
    stage = online(str(model), REWARD, str(demonstrations), pretraining=mix, ema=0.99)
    stage["algorithm"]["critic_warmup"] = 1
    [found] = checked(stage, measure=True).stages
    said = "4 of 8 texts are learnt, each once in 2.0 steps: 0.1 × the objective + 0.9 × their −log p per token"
    assert any(said in rule for rule in found.seen.rules), found.seen.rules
    assert found.seen.memory is not None
    held = found.seen.memory.bytes
    assert 0 < held["moving average"] < held["trained weights"], "of the policy alone, not of the value"


def test_texts_that_cannot_be_read_are_a_fault_of_the_stage(
    checked: Check, model: Path, demonstrations: Path, tmp_path: Path
) -> None:
    empty = write_rows(tmp_path / "long.jsonl", [{"prompt": "a" * 90, "completion": "b"}])
    mix = {"data": str(empty), "coef": 1.0, "encoding": {"max_length": 8, "long_prompts": "drop"}}
    found = checked(online(str(model), REWARD, str(demonstrations), pretraining=mix))
    assert any("pretraining.data: no record is left" in fault for fault in found.all_faults), found.all_faults

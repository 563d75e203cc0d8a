"""Which answers a report shows: the first as they come, then named picks; nothing hidden."""

import json

from palate.diagnosis import samples
from palate.diagnosis.run_folder import read


def test_the_first_come_unpicked_and_the_extremes_are_named(write_run):
    folder = write_run()
    rows = [json.loads(line) for line in (folder / "4-evaluate" / "samples.jsonl").read_text().splitlines()]
    found = samples.of(read(folder))
    assert [s.prompt for s in found[:6]] == [row["prompt"] for row in rows[:6]]
    assert {s.why for s in found[:6]} == {"as it came"}
    gains = [r["scores"]["ppo"]["gold"] - r["scores"]["sft"]["gold"] for r in rows[6:]]
    greatest = rows[6:][gains.index(max(gains))]
    assert any(s.why.endswith("gains") and s.sides[1].text == greatest["completions"]["ppo"] for s in found[6:])
    assert sum(s.why.endswith("losses") for s in found) == 2


def test_the_higher_score_of_a_row_is_marked_and_ties_are_not(write_run):
    folder = write_run()
    row = {
        "prompt": "p",
        "completions": {"a": "x", "b": "y"},
        "scores": {"a": {"gold": 1.0, "proxy": 2.0}, "b": {"gold": 3.0, "proxy": 2.0}},
        "parts": {"a": {"total": 1.0, "coverage": 0.5}},
    }
    (folder / "4-evaluate" / "samples.jsonl").write_text(json.dumps(row) + "\n")
    [sample] = samples.of(read(folder))
    assert sample.sides[0].scores == (("gold", 1.0, False), ("proxy", 2.0, False))
    assert sample.sides[1].scores == (("gold", 3.0, True), ("proxy", 2.0, False))
    assert sample.sides[0].parts == (("coverage", 0.5),)


def test_without_evaluation_training_shows_its_first_and_last_step(write_run):
    found = samples.of(read(write_run(stages=("sft", "reward", "rlhf"))))
    assert [s.sides[0].name for s in found] == ["step 1"] * 4 + ["step 120"] * 4
    assert found[0].sides[0].scores == (("score", 0.3, False), ("gold", 1.2, False))


def test_rows_of_unexpected_shape_are_passed_over(write_run):
    folder = write_run()
    (folder / "4-evaluate" / "samples.jsonl").write_text(
        '{"step": 0}\n{"completions": {"a": 3}}\n{"completions": []}\n'
    )
    assert [s.sides[0].text for s in samples.of(read(folder))] == ["3"]


def test_no_samples_at_all(write_run):
    assert samples.of(read(write_run(stages=("sft",)))) == []

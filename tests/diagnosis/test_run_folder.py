"""Reading a run: whole, torn, empty, or full of surprises; never a fault."""

import json
import math

import pytest

from palate.diagnosis.run_folder import at, number, read


def test_a_whole_run_has_its_stages_in_order_and_nothing_missing(write_run):
    run = read(write_run())
    assert [(s.name, s.finished) for s in run.stages] == [(n, True) for n in ("sft", "reward", "rlhf", "evaluate")]
    assert run.missing == ()
    assert all(s.missing == () for s in run.stages)
    assert run.evaluated is run.stages[3]
    assert run.online is run.stages[2]


def test_ten_stages_are_ordered_by_number_not_by_letter(tmp_path):
    for i in range(1, 12):
        (tmp_path / f"{i}-s{i}").mkdir()
    (tmp_path / "replaced").mkdir()
    assert [s.name for s in read(tmp_path).stages] == [f"s{i}" for i in range(1, 12)]


def test_an_empty_folder_is_a_run_in_which_nothing_happened(tmp_path):
    run = read(tmp_path)
    assert run.stages == ()
    assert "no stage has started" in run.missing
    assert "provenance.json is not there" in run.missing


def test_a_torn_last_line_is_left_out_and_named(write_run):
    folder = write_run()
    path = folder / "3-rlhf" / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    stage = read(folder).stages[2]
    assert len(stage.metrics) == 119
    assert stage.missing == ("metrics.jsonl has 1 torn line",)


@pytest.mark.parametrize("name", ["run.yaml", "provenance.json", "3-rlhf/stage.yaml", "4-evaluate/evaluation.json"])
@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "]", "a: [", "\x00"])
def test_files_of_any_content_are_read_without_a_fault(write_run, name, content):
    folder = write_run()
    (folder / name).write_text(content)
    assert len(read(folder).stages) == 4


def test_files_that_are_not_text_are_named(write_run):
    folder = write_run()
    (folder / "provenance.json").write_bytes(b"\xff\xfe\x00")
    assert any("provenance.json cannot be read" in text for text in read(folder).missing)


def test_series_are_finite_and_lost_numbers_are_known(tmp_path):
    (tmp_path / "1-sft").mkdir()
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": math.nan}, {"loss": 4.0}]
    (tmp_path / "1-sft" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stage = read(tmp_path).stages[0]
    assert stage.series("loss") == [(1, 2.0)]
    assert stage.broken("loss") == [2, 3]
    assert stage.series("never logged") == []
    assert stage.metric_names == ("loss",)


def test_numbers_in_nested_mappings():
    value = {"a": {"b": 3, "c": "text", "d": True, "e": math.inf}}
    assert at(value, "a", "b") == 3.0
    assert [at(value, "a", key) for key in "cdef"] == [None] * 4
    assert at(value, "a", "b", "deeper") is None
    assert number(False) is None


def test_no_such_folder_is_the_only_fault(tmp_path):
    with pytest.raises(NotADirectoryError):
        read(tmp_path / "absent")

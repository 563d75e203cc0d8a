"""The back end of a run: said, recorded, and kept by the sessions that go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from palate import products
from palate.live import Display
from palate.models import linear
from palate.models.linear import Gains
from palate.products import choose
from palate.run import execute, plan
from palate.settings import PalateError
from tests.stages import tiny_runs

there = pytest.mark.skipif(linear.gains().learning == 0, reason="this torch has no oneDNN products in float32")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = linear.backend()
    yield
    linear.use(before)


def test_auto_measures_once_and_a_later_session_takes_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "gains", lambda: Gains(1.5, 2.0))
    first = choose("auto", {})
    assert (first.backend, first.gain, first.writing) == ("onednn", 1.5, 2.0)
    assert "onednn (oneDNN is 1.50x as fast as torch's own, 2.00x while answers are written)" in first.line
    monkeypatch.setattr(linear, "gains", lambda: Gains(0.5, 0.5))
    again = choose("auto", json.loads(json.dumps(first.record)))
    assert again == first


def test_where_only_writing_gains_only_writing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "gains", lambda: Gains(1.01, 1.2))
    first = choose("auto", {})
    assert first.backend == "writing"
    assert "writing (oneDNN is 1.01x as fast as torch's own, 1.20x while answers are written)" in first.line
    monkeypatch.setattr(linear, "gains", lambda: Gains(1.2, 1.2))
    assert choose("auto", json.loads(json.dumps(first.record))) == first


def test_what_an_older_version_recorded_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "gains", lambda: Gains(0.5, 0.5))
    old = {"asked": "auto", "backend": "onednn", "gain": 1.3, "processor": products.processor()}
    assert choose("auto", old).backend == "onednn"


def test_another_processor_measures_again_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "gains", lambda: Gains(1.5, 2.0))
    first = choose("auto", {})
    monkeypatch.setattr(linear, "gains", lambda: Gains(0.5, 0.5))
    monkeypatch.setattr(products, "processor", lambda: "another one")
    again = choose("auto", first.record)
    assert again.backend == "plain"
    assert "measured again" in again.line
    assert again.record["processor"] == "another one"


def test_what_is_asked_for_overrules_and_is_not_taken_for_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "gains", lambda: Gains(1.5, 2.0))
    first = choose("auto", {})
    asked = choose("plain", first.record)
    assert (asked.backend, asked.gain, asked.writing) == ("plain", None, None)
    assert asked.line == "matrix products on the CPU: plain (as asked)"
    assert choose("auto", asked.record).backend == "onednn"


def test_asking_for_what_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_agrees", lambda: False)
    for asked in ("writing", "onednn"):
        with pytest.raises(PalateError, match="linear: oneDNN was asked for"):
            choose(asked, {})


@there
def test_a_run_says_and_records_its_back_end_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_runs.write_prompts(tmp_path / "rows.jsonl")
    stage = tiny_runs.sft(tiny_runs.save_model(tmp_path / "start"), str(data), num_train_epochs=1)
    given: dict[str, Any] = {"name": "tiny", "output_dir": str(tmp_path), "stages": [stage]}

    def session(**more: Any) -> tuple[dict[str, Any], str]:
        execute(plan({**given, **more}), Display(Console(stderr=True)))
        said = json.loads((tmp_path / "tiny" / "provenance.json").read_text())
        return said["products"], capsys.readouterr().err

    monkeypatch.setattr(linear, "gains", lambda: Gains(3.0, 4.0))
    record, said = session()
    assert said.count("matrix products on the CPU: onednn (oneDNN is 3.00x as fast as torch's own") == 1
    assert record["backend"] == linear.backend() == "onednn"
    linear.use("plain")
    monkeypatch.setattr(linear, "gains", lambda: Gains(0.1, 0.1))
    assert session()[0] == record
    assert linear.backend() == "onednn"
    record, said = session(linear="plain")
    assert record["backend"] == linear.backend() == "plain"
    assert "sft: done before, skipped" in said

"""The waiting ends at a process's mark or at its end, its failure is told, and rows take turns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import startup
from bench.startup import Row, measure, page, wait


def _python(text: str) -> Row:
    return Row(lambda _: (sys.executable, "-S", "-c", text))


def test_the_mark_ends_the_waiting_before_the_process_does(tmp_path: Path) -> None:
    text = "import time, pathlib; pathlib.Path('here').write_text('1'); time.sleep(0.5)"
    marked = wait(Row(lambda _: (sys.executable, "-S", "-c", text), "here"), tmp_path)
    assert marked < 0.5 <= wait(_python(text), tmp_path)


def test_a_process_that_fails_or_leaves_no_mark_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        wait(_python("raise SystemExit(3)"), tmp_path)
    with pytest.raises(RuntimeError, match="ended with 0"):
        wait(Row(lambda _: (sys.executable, "-S", "-c", "pass"), "nothing"), tmp_path)


def test_the_first_turn_is_not_counted() -> None:
    seconds = measure({"one": _python("pass"), "two": _python("pass")}, 2)
    assert [len(spent) for spent in seconds.values()] == [2, 2]


def test_a_real_first_step_leaves_its_mark(tmp_path: Path) -> None:
    assert wait(startup.rows(None)["palate run, first SFT step"], tmp_path) > 0


def test_peers_are_asked_only_where_they_are() -> None:
    assert not [name for name in startup.rows(None) if "trl" in name.lower()]
    assert "trl dpo --help" in startup.rows(Path("somewhere"))


def test_the_page_shows_medians_and_says_who_was_missing() -> None:
    text = page({"palate --help": [0.3, 0.1, 0.2]}, 3)
    assert "| palate --help | 0.20 s | 0.10 – 0.30 s |" in text
    assert "TRL was not at hand" in text

"""Where numbers go: a file that never forks, and trackers that never stop a run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from palate.settings import PalateError
from palate.tracking import TRACKERS, JsonLines, Trackers, require_known


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_are_one_line_each_and_come_back(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.append(1, [{"loss": 0.1 + 0.2}])
    log.append(2, [{"text": "a\nb", "deep": {"x": math.nan}}, {"list": [math.inf, 1.0]}])
    rows = JsonLines(tmp_path / "metrics.jsonl").read()
    assert rows[0] == {"step": 1, "loss": 0.1 + 0.2}
    assert rows[1:] == [{"step": 2, "text": "a\nb", "deep": {"x": None}}, {"step": 2, "list": [None, 1.0]}]


def test_a_second_process_cuts_what_it_says_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in (1, 2, 3, 4):
        first.append(step, [{"loss": 1.0}])
    JsonLines(path).append(3, [{"loss": 2.0}])
    assert _steps(path) == [1, 2, 3]
    assert JsonLines(path).read()[-1]["loss"] == 2.0


def test_within_one_process_a_step_may_speak_twice(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.append(1, [{"loss": 1.0}])
    log.append(1, [{"eval/loss": 1.0}])
    assert _steps(log.path) == [1, 1]


def test_a_torn_line_and_a_stranger_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1, 2]\n{"step": "x"}\n\xff\xfe\n{"step": 2}\n{"step": 3, "lo')
    log = JsonLines(path)
    log.append(3, [{"loss": 1.0}])
    assert _steps(path) == [1, 2, 3]


def test_half_a_character_from_a_byte_level_model_is_written_somehow(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "samples.jsonl")
    log.append(1, [{"completion": "ok \ud83d"}])
    assert log.read()[0]["completion"].startswith("ok ")


def test_warnings_of_earlier_processes_stay(tmp_path: Path) -> None:
    JsonLines(tmp_path / "w", keep=True).append(5, [{"warning": "old"}])
    JsonLines(tmp_path / "w", keep=True).append(0, [{"warning": "new"}])
    assert _steps(tmp_path / "w") == [5, 0]


def test_a_torn_warning_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b'{"step": 5, "warning": "old"}\n{"step": 6, "warn')
    JsonLines(path, keep=True).append(0, [{"warning": "new"}])
    assert _steps(path) == [5, 0]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    """/dev/full refuses every byte as a full disk does, with the same error number."""
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = JsonLines(path)
    log._opened = True  # it was written to before the disk filled up
    with pytest.raises(PalateError, match=r"metrics\.jsonl: cannot be written: the disk is full\. Make room and run"):
        log.append(1, [{"loss": 1.0}])


GROWS_TOO_LARGE = """
    import resource, sys
    from pathlib import Path
    from palate.settings import PalateError
    from palate.tracking import JsonLines
    log = JsonLines(Path(sys.argv[1]))
    log.append(1, [{"text": "a" * 500}])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    for step in (2, 3):
        try:
            log.append(step, [{"text": "b" * 800}])
        except PalateError as fault:
            print(fault)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """The operating system takes the first part of a line and refuses the rest."""
    path = tmp_path / "samples.jsonl"
    program = textwrap.dedent(GROWS_TOO_LARGE)
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.count("samples.jsonl: cannot be written: File too large") == 2, done.stderr
    assert _steps(path) == [1]
    assert path.read_bytes().endswith(b"\n")


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    heard: list[str] = []
    trackers = Trackers({"tensorboard": TRACKERS["tensorboard"]}, tmp_path, "sft", {}, heard.append)
    trackers.log(1, {"loss": 0.5})
    trackers.log(2, {"loss": 0.25})
    trackers.close()
    assert heard == []
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


class _Breaks:
    """A tracker that fails at a stated moment, as a service does."""

    def __init__(self, moment: str, calls: list[str]) -> None:
        self.moment, self.calls = moment, calls
        self._say("open")

    def _say(self, moment: str) -> None:
        self.calls.append(moment)
        if moment == self.moment:
            raise ConnectionError("the service is away")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._say("log")

    def close(self) -> None:
        self._say("close")


@pytest.mark.parametrize(
    ("moment", "calls"), [("open", ["open"]), ("log", ["open", "log"]), ("close", ["open", "log", "log", "close"])]
)
def test_a_tracker_that_fails_is_told_about_once_and_left_alone(tmp_path: Path, moment: str, calls: list[str]) -> None:
    heard: list[str] = []
    seen: list[str] = []

    def opener(run: Path, stage: str, settings: Mapping[str, Any], step: int) -> _Breaks:
        return _Breaks(moment, seen)

    trackers = Trackers({"away": opener}, tmp_path, "sft", {}, heard.append)
    trackers.log(1, {"loss": 1.0})
    trackers.log(2, {"loss": 1.0})
    trackers.close()
    assert seen == calls
    assert len(heard) == 1
    assert "away is switched off for this stage: ConnectionError: the service is away" in heard[0]


def test_an_unknown_tracker_is_refused_with_the_nearest() -> None:
    require_known(["tensorboard", "trackio", "wandb"])
    with pytest.raises(PalateError, match=r"'wandbb'\. Did you mean 'wandb'\?"):
        require_known(["wandbb"])

"""The soak measures a real run from inside, and a run that leaks or slows down breaks its promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest

from bench.soak import Watch, draw, figures, slowest, table, thinned

STEPS = 60
LEAKING = """
import sys
from bench.soak import main
from palate.step import Stepper

kept, step = [], Stepper.step

def leaking(self, *given, **more):
    kept.append((bytearray(2**20), open("/dev/null")))
    return step(self, *given, **more)

Stepper.step = leaking
sys.exit(main(sys.argv[1:]))
"""


def soaked(start: list[str], folder: Path) -> tuple[int, str, dict[str, Any]]:
    words = [sys.executable, *start, "--steps", str(STEPS), "--json", str(folder / "soak.json")]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout, done.stderr
    return done.returncode, done.stdout, json.loads((folder / "soak.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_real_stage_keeps_its_memory_its_handles_and_its_threads(tmp_path: Path) -> None:
    _, said, found = soaked(["-m", "bench.soak"], tmp_path)
    assert found["steps"] == STEPS - 1  # a step lasts from one log to the next
    assert all(len(values) == STEPS - 1 for values in found["series"].values())
    assert found["growth"] < 0.02, said
    assert found["handles_least"] == found["handles_most"] > 2
    assert found["threads_least"] == found["threads_most"] >= 1
    assert 0 < found["step_median"] <= found["step_p99"] <= found["step_longest"]
    assert 50e6 < found["resident_after"] < 5e9


@pytest.mark.slow
def test_a_run_that_leaks_memory_and_handles_is_caught(tmp_path: Path) -> None:
    code, said, found = soaked(["-c", LEAKING], tmp_path)
    assert code == 1
    assert "memory grows by less than 2% after the first tenth: **no**" in said
    assert "file handles stays the same: **no**" in said
    assert found["handles_most"] - found["handles_least"] == pytest.approx(0.9 * STEPS, abs=2)


def seen(steps: int, slow: int = 0, growth: float = 0.0, handles: int = 0) -> Watch:
    """A run of 20 ms steps of which the last `slow` take three times as long."""
    return Watch(
        seconds=array("d", [0.02] * (steps - slow) + [0.06] * slow),
        waited=array("d", [0.0] * steps),
        resident=array("d", [1e8 * (1 + growth * i / steps) for i in range(steps)]),
        handles=array("d", [8.0] * (steps - handles) + [9.0] * handles),
        threads=array("d", [2.0] * steps),
    )


def test_each_promise_is_broken_by_its_own_fault() -> None:
    assert all(figures(seen(1000)).promises.values())
    for fault, word in (({"slow": 20}, "steps"), ({"growth": 0.05}, "memory"), ({"handles": 1}, "handles")):
        found = figures(seen(1000, **fault))  # pyright: ignore[reportArgumentType]
        broken = [text for text, kept in found.promises.items() if not kept]
        assert len(broken) == 1
        assert word in broken[0]
        assert table(found).count("**no**") == 1
    assert all(figures(seen(1000, slow=5, growth=0.01)).promises.values())


def test_the_first_tenth_may_settle() -> None:
    watch = seen(1000)
    for step in range(90):
        watch.resident[step] = 1e6
        watch.seconds[step] = 1.0
        watch.handles[step] = 1.0
    assert all(figures(watch).promises.values())


def test_the_chart_shows_medians_and_the_slowest_of_neighbours() -> None:
    points = [(float(i), 9.0 if i == 7 else 1.0) for i in range(1000)]
    assert len(thinned(points)) == 200
    assert {y for _, y in thinned(points)} == {1.0}
    assert max(y for _, y in slowest(points)) == 9.0
    assert draw(seen(1000)).count("<svg") == 3

"""Kill a run at any moment, give the same command again: the end is bitwise that of a run never killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench.chain import CHAIN, CHANGED, CHANGED_BACK, NUMBERED_BACK, RENUMBERED

RANDOM = 8


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_bitwise_like_one_never_killed(tmp_path: Path) -> None:
    """SFT, reward and PPO, real processes and real signals, with one and with two threads; see bench/chaos.py."""
    words = ["--kills", str(RANDOM), "--seed", "3", "--folder", str(tmp_path), "--json", str(tmp_path / "found.json")]
    done = subprocess.run([sys.executable, "-m", "bench.chaos", *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert len(found) == 2
    for one in found:
        assert one["unequal"] == one["astray"] == one["missed"] == []
        _every_exact_moment_was_met(one["kills"])
    kills = [kill for one in found for kill in one["kills"]]
    ways = Counter(kill["way"] for kill in kills)
    assert len(kills) - ways["asked to stop"] >= 20
    assert ways["by the clock, a process of its own"] >= 2
    assert sum(count for way, count in ways.items() if way not in ("at an exact moment", "asked to stop")) == RANDOM
    assert {kill["where"].partition(":")[0] for kill in kills} >= {"1-sft", "2-reward", "3-rlhf"}
    assert sum(kill["damage"] is not None for kill in kills) >= 4


def _every_exact_moment_was_met(kills: list[dict[str, str]]) -> None:
    links = [*CHAIN, *CHANGED, *CHANGED_BACK, *RENUMBERED, *NUMBERED_BACK]
    killed = [link.moment.name for link in links if link.moment.signal == signal.SIGKILL]
    asked = [link.moment.name for link in links if link.moment.signal != signal.SIGKILL]
    assert [kill["name"] for kill in kills if kill["way"] == "at an exact moment"] == killed
    assert [kill["name"] for kill in kills if kill["way"] == "asked to stop"] == asked

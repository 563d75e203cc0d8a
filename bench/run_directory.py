"""What can be seen of a run from outside: what was going on in its folder, what it made, and how to damage it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

CLOCK = ("step_time", "tokens_per_second", "time")
"""Metrics that a clock decides."""


def going_on(run: Path, since: float) -> str:
    """Stage and activity of a process that started at `since` and was killed, as its files tell."""
    stages = sorted(run.glob("[0-9]*-*"))
    unfinished = [stage for stage in stages if not (stage / "DONE").exists()]
    if not stages:
        return "starting"
    if not unfinished:
        return f"{stages[-1].name}: done"
    stage = unfinished[-1]
    return f"{stage.name}: {_activity(stage, since)}"


def _activity(stage: Path, since: float) -> str:
    def fresh(pattern: str) -> bool:
        return any(path.stat().st_mtime > since for path in stage.glob(pattern))

    if fresh("checkpoints/.*") or fresh("checkpoints/*.before"):
        return "saving a checkpoint"
    if fresh(".model.*"):
        return "saving the model"
    if fresh("model"):
        return "finishing"
    return "training" if fresh("metrics.jsonl") else "opening"


def differences(one: Path, other: Path) -> list[str]:
    """The files of `one` that `other` has not alike: weights and samples byte by byte, metrics but for the clock."""
    names = sorted(str(path.relative_to(one)) for path in _made(one))
    return [name for name in names if _content(one / name) != _content(other / name)]


def _made(run: Path) -> Iterator[Path]:
    for stage in run.glob("[0-9]*-*"):
        yield from stage.glob("model/**/*.safetensors")
        yield from (path for path in stage.glob("*.jsonl") if path.name != "warnings.jsonl")  # tells of damage met
        yield stage / "DONE"


def _content(path: Path) -> bytes | list[object] | None:
    if not path.exists():
        return None
    if path.name == "DONE":
        return b"there"  # it says when
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def damage(run: Path, draw: random.Random) -> str | None:
    """Flip one bit in the newest checkpoint there is, or take one of its files away; says what was done."""
    folders = sorted(run.glob("*/checkpoints/step-*"), key=lambda folder: folder.stat().st_mtime)
    files = sorted(file for folder in folders[-1:] for file in folder.iterdir())
    if not files:
        return None
    file = draw.choice(files)
    if draw.random() < 0.5:
        file.unlink()
        return f"{file.relative_to(run)} taken away"
    body = bytearray(file.read_bytes())
    bit = draw.randrange(8 * len(body))
    body[bit // 8] ^= 1 << bit % 8
    file.write_bytes(body)
    return f"bit {bit} of {file.relative_to(run)} flipped"

"""What was measured: one record per row, kept in results.json, row by row, so that rows can be measured again alone."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.speed import accounting
from bench.speed.machine import LIMIT
from bench.speed.runner import Taken, Turn
from bench.speed.workloads import Row

Record = dict[str, Any]
AGREE = 1e-4
"""How far the compared numbers of both systems may lie apart."""


def counted(taken: Taken, count: int) -> list[Turn]:
    """The turns that count; the least disturbed ones where too few were undisturbed."""
    if taken.clean >= count:
        return [turn for turn in taken.turns if turn.clean]
    return sorted(taken.turns, key=lambda turn: turn.others)[:count]


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(numbers), "min": min(numbers), "max": max(numbers)}


def measured(row: Row, taken: Taken, count: int, facts: Mapping[str, Any]) -> Record:
    """One system's side of a row: seconds, parts, GFLOP/s of each part, tokens, peak memory."""
    turns = counted(taken, count)
    reports = [turn.report for turn in turns]
    work = [accounting.parts(row, report["counts"]) for report in reports]
    parts: dict[str, dict[str, float]] = {}
    for name in work[0]:
        took = [report.get("parts", {}).get(name) for report in reports] if len(work[0]) > 1 else [None]
        if None not in took:
            pace = [w[name] / t for w, t in zip(work, took, strict=True)]
            parts[name] = {"seconds": median(took), "gflops": median(pace)}
    tokens = [sum(report["counts"].values()) for report in reports]
    if row.kind not in ("ppo", "grpo", "rloo", "generate"):
        tokens = [report["counts"]["read"] for report in reports]
    elif row.kind == "generate":
        tokens = [report["counts"]["drawn"] for report in reports]
    seconds = [report["seconds"] for report in reports]
    return {
        "versions": {k: v for k, v in facts.items() if k != "ready"},
        "seconds": spread(seconds),
        "tokens": median(tokens),
        "tokens_per_second": median(t / s for t, s in zip(tokens, seconds, strict=True)),
        "gflop": median(sum(w.values()) for w in work),
        "gflops": median(sum(w.values()) / s for w, s in zip(work, seconds, strict=True)),
        "parts": parts,
        "peak_mb": max(turn.report["peak_mb"] for turn in taken.turns),
        "rounds": len(turns),
        "taken": len(taken.turns),
        "disturbed": sum(turn.others > LIMIT for turn in turns),
        "compared": compared(row, taken),
    }


def compared(row: Row, taken: Taken) -> list[float]:
    """The numbers that are to be the other system's too, turn by turn, the warm-up included."""
    if not row.agree:
        return []
    reports = [turn.report for turn in (taken.warm_up, *taken.turns)]
    return [float(report[row.agree]) for report in reports[: row.agree_turns]]


def apart(record: Record) -> float | None:
    """How far the compared numbers of both systems lie apart at most; None where nothing is compared."""
    ours, theirs = record["palate"]["compared"], (record.get("peer") or {}).get("compared", [])
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=False)), default=None)


def ratio(record: Record) -> float | None:
    """How many times as long the peer takes; None where it was not there."""
    peer = record.get("peer")
    return peer["seconds"]["median"] / record["palate"]["seconds"]["median"] if peer else None


def memory(record: Record) -> float | None:
    """palate's peak memory as a share of the peer's."""
    peer = record.get("peer")
    return record["palate"]["peak_mb"] / peer["peak_mb"] if peer else None


def stamp() -> str:
    """Today."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def read(path: Path) -> dict[str, Any]:
    """The records so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """All records."""
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")

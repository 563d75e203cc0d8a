"""Answers before and after, side by side: from an evaluation where there is one, else from training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palate.diagnosis.findings import judge_of
from palate.diagnosis.run_folder import Row, RunFolder, StageFolder, at, mapping, number

_FIRST, _EXTREME = 6, 2
"""How many prompts are shown as they come, and how many more of the greatest gains and of the greatest losses."""


@dataclass(frozen=True)
class Side:
    """One answer to a prompt: who said it, the text, and (name, score, whether it is the best of the row).

    `parts` are what the scores are made of, where the evaluation knows.
    """

    name: str
    text: str
    scores: tuple[tuple[str, float, bool], ...]
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Sample:
    """One prompt with its answers side by side; `why` says how it came to be shown."""

    prompt: str
    why: str
    sides: tuple[Side, ...]


def of(run: RunFolder) -> list[Sample]:
    """The samples a report shows; empty where none were written."""
    if run.evaluated and run.evaluated.samples:
        return _evaluated(run.evaluated)
    trained = run.online or next((s for s in reversed(run.stages) if s.samples), None)
    return _trained(trained) if trained else []


def _evaluated(stage: StageFolder) -> list[Sample]:
    rows = [row for row in stage.samples if mapping(row, "completions")]
    shown = rows[:_FIRST]
    sample = [_sample(row, "as it came") for row in shown]
    gains = sorted(_gains(rows[_FIRST:], judge_of(mapping(stage.evaluation))), key=lambda gain: gain[0])
    greatest = [row for gain, row in reversed(gains[-_EXTREME:]) if gain > 0]
    least = [row for gain, row in gains[:_EXTREME] if gain < 0]
    sample += [_sample(row, "picked: among the greatest gains") for row in greatest]
    return sample + [_sample(row, "picked: among the greatest losses") for row in least]


def _gains(rows: Sequence[Row], judge: str | None) -> Iterator[tuple[float, Row]]:
    """(score of the last model minus the first's, row) of the rows that the judge scored on both sides."""
    for row in rows:
        names = list(mapping(row, "completions"))
        before, after = (at(row, "scores", name, judge or "") for name in (names[0], names[-1]))
        if before is not None and after is not None:
            yield after - before, row


def _sample(row: Row, why: str) -> Sample:
    completions = mapping(row, "completions")
    scores = {name: _numbers(mapping(row, "scores", name)) for name in completions}
    best = _best(list(scores.values()))
    sides = tuple(
        Side(name, str(text), _marked(scores[name], best), _parts(mapping(row, "parts", name)))
        for name, text in completions.items()
    )
    return Sample(str(row.get("prompt", "")), why, sides)


def _trained(stage: StageFolder) -> list[Sample]:
    """The first and the last samples of a stage; the prompts differ, so only their scores can be compared."""
    rows = [row for row in stage.samples if "completion" in row and at(row, "step") is not None]
    if not rows:
        return []
    first, last = min(at(r, "step") or 0 for r in rows), max(at(r, "step") or 0 for r in rows)
    ends = dict.fromkeys((first, last))
    return [_single(row, f"step {step:.0f}") for step in ends for row in rows if at(row, "step") == step]


def _single(row: Row, name: str) -> Sample:
    scores = _numbers({k: v for k, v in row.items() if k not in ("step", "prompt", "completion")})
    side = Side(name, str(row["completion"]), _marked(scores, {}))
    return Sample(str(row.get("prompt", "")), f"during training, {name}", (side,))


_SUMMED = ("total", "distinct")
"""Parts that say nothing of one answer: the score again, and a share over many answers."""


def _parts(parts: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    return tuple((name, value) for name, value in _numbers(parts).items() if name not in _SUMMED)


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, given in scores.items() if (value := number(given)) is not None}


def _best(sides: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The highest score of each reward, for those on which the sides differ."""
    names = dict.fromkeys(name for side in sides for name in side)
    heard = {name: [side[name] for side in sides if name in side] for name in names}
    return {name: max(values) for name, values in heard.items() if len(set(values)) > 1}


def _marked(scores: Mapping[str, float], best: Mapping[str, float]) -> tuple[tuple[str, float, bool], ...]:
    return tuple((name, value, best.get(name) == value) for name, value in scores.items())

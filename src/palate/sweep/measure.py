"""The one number a sweep compares its runs by, read from what their stages logged."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from palate.settings import PalateError, nearest
from palate.sweep.sweep import Run
from palate.tracking import JsonLines

Goal = Literal["max", "min"]

DEFAULTS: tuple[tuple[str, Goal], ...] = (
    ("evaluate/win_rate/*/gold", "max"),
    ("evaluate/win_rate/*", "max"),
    ("evaluate/score/*/gold", "max"),
    ("evaluate/score/*", "max"),
    ("evaluate/accuracy/*", "max"),
    ("gold/mean", "max"),
    ("eval/accuracy", "max"),
    ("eval/loss", "min"),
    ("objective/scores", "max"),
    ("accuracy", "max"),
    ("mean_token_accuracy", "max"),
    ("loss", "min"),
)
"""What a sweep compares by when it is not told: the first of these in the last row that the last stage logged. Of
several that fit one pattern, the last: an evaluation names its models in the order of training.
"""


@dataclass(frozen=True)
class Measure:
    """A metric and whether more or less of it is better."""

    metric: str
    goal: Goal

    @property
    def sign(self) -> float:
        """1 where more is better, −1 where less is."""
        return 1.0 if self.goal == "max" else -1.0

    def of(self, run: Run) -> float | None:
        """The value at the end of a run; None where it was not logged, or was not finite."""
        for folder in reversed(_stages(run)):
            for row in reversed(_rows(folder)):
                if self.metric in row:
                    value = row[self.metric]
                    return float(value) if isinstance(value, int | float) else None
        return None


def choose(run: Run, metric: str | None, goal: Goal | None) -> Measure:
    """The measure of a sweep, from its first finished run.

    Raises PalateError for a metric that no stage logged, or one whose goal is not known and was not given.
    """
    if metric is not None:
        known = {name for folder in _stages(run) for row in _rows(folder) for name in row}
        if metric not in known:
            raise PalateError(
                f"--metric {metric}: no stage of {run.name} logged it.{nearest(metric, known)} "
                f"See {_stages(run)[-1] / 'metrics.jsonl'}."
            )
        return Measure(metric, goal_of(metric, goal))
    for folder in reversed(_stages(run)):
        rows = _rows(folder)
        if rows:
            return _default(rows[-1], goal, folder)
    raise PalateError(f"{run.folder}: no stage logged a metric, so there is nothing to compare.")


def goal_of(metric: str, given: Goal | None) -> Goal:
    """Whether more of a metric is better. Raises PalateError when that is neither given nor known."""
    fitting: list[Goal] = [goal for pattern, goal in DEFAULTS if fnmatch.fnmatchcase(metric, pattern)]
    if given is not None:
        return given
    if not fitting:
        raise PalateError(f"--metric {metric}: say whether more of it is better: --goal max or --goal min.")
    return fitting[0]


def _default(row: Mapping[str, Any], goal: Goal | None, folder: Path) -> Measure:
    for pattern, known in DEFAULTS:
        fitting = [name for name in row if fnmatch.fnmatchcase(name, pattern)]
        if fitting:
            return Measure(fitting[-1], goal or known)
    raise PalateError(f"{folder / 'metrics.jsonl'}: no metric to compare by is known there. Name one: --metric NAME.")


def _stages(run: Run) -> Sequence[Path]:
    return [run.plan.stage_folder(i) for i in range(len(run.plan.stages))]


def _rows(folder: Path) -> list[dict[str, Any]]:
    return JsonLines(folder / "metrics.jsonl").read()

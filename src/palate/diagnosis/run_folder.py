"""A run directory as values: whatever is there is read, whatever is not is named as missing, nothing is a
fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import yaml

Row = Mapping[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder. `finished` is whether its DONE file is there."""

    folder: Path
    name: str
    kind: str
    settings: Row
    metrics: tuple[Row, ...]
    samples: tuple[Row, ...]
    warnings: tuple[Row, ...]
    evaluation: Row | None
    finished: bool
    missing: tuple[str, ...]

    @cached_property
    def tokens(self) -> tuple[Row, ...]:
        """A few answers token by token, as an online stage wrote them; read when they are asked for."""
        return _lines(self.folder / "tokens.jsonl", None)

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        """Every metric the stage logged, in order of appearance."""
        return tuple(dict.fromkeys(name for row in self.metrics for name in row if name != "step"))

    def series(self, metric: str) -> Points:
        """(step, value) of one metric, rows without a finite value left out."""
        return [(step, v) for step, v in self._values(metric) if math.isfinite(v)]

    def broken(self, metric: str) -> list[float]:
        """The steps at which a metric was not a finite number."""
        return [step for step, v in self._values(metric) if not math.isfinite(v)]

    def _values(self, metric: str) -> Iterator[tuple[float, float]]:
        for row in self.metrics:
            step, value = number(row.get("step")), row.get(metric)
            # JSON has no NaN: a logger writes null, the word or Python's own spelling; all mean "no number".
            if step is not None and metric in row:
                found = number(value)
                yield step, math.nan if found is None else found


@dataclass(frozen=True)
class RunFolder:
    """A whole run; `stages` in the order they ran, `resolved` the text of resolved.yaml with its origins."""

    folder: Path
    given: Row
    resolved: str
    provenance: Row
    stages: tuple[StageFolder, ...]
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the run is called: the last part of its path, whatever the path says it is."""
        return self.folder.resolve().name

    @property
    def evaluated(self) -> StageFolder | None:
        """The last stage that left an evaluation with at least one model."""
        return next((s for s in reversed(self.stages) if s.evaluation and mapping(s.evaluation, "models")), None)

    @property
    def online(self) -> StageFolder | None:
        """The last stage that trained on its own answers: the one that logged a KL to the reference."""
        return next((s for s in reversed(self.stages) if "objective/kl" in s.metric_names), None)


def read(folder: Path) -> RunFolder:
    """Read a run directory. Only a folder that is not there raises: NotADirectoryError."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such run directory")
    missing: list[str] = []
    stages = [read_stage(path) for path in sorted(_stage_folders(folder), key=_number)]
    if not stages:
        missing.append("no stage has started")
    return RunFolder(
        folder=folder,
        given=as_mapping(_load(folder / "run.yaml", missing)),
        resolved=_text(folder / "resolved.yaml", missing),
        provenance=as_mapping(_load(folder / "provenance.json", missing)),
        stages=tuple(stages),
        missing=tuple(missing),
    )


def _stage_folders(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and path.name.partition("-")[0].isdigit() and "-" in path.name:
            yield path


def _number(path: Path) -> tuple[int, str]:
    return int(path.name.partition("-")[0]), path.name


def read_stage(folder: Path) -> StageFolder:
    """Read one stage's folder. Nothing that is absent or broken raises."""
    missing: list[str] = []
    settings = as_mapping(_load(folder / "stage.yaml", missing))
    finished = (folder / "DONE").exists()
    metrics = _lines(folder / "metrics.jsonl", missing)
    evaluation = folder / "evaluation.json"
    return StageFolder(
        folder=folder,
        name=str(settings.get("name") or folder.name.partition("-")[2]),
        kind=str(settings.get("kind") or "unknown"),
        settings=settings,
        metrics=metrics,
        samples=_lines(folder / "samples.jsonl", None),
        warnings=_lines(folder / "warnings.jsonl", None),
        evaluation=as_mapping(_load(evaluation, missing)) if evaluation.exists() else None,
        finished=finished,
        missing=tuple(missing),
    )


def _text(path: Path, missing: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing.append(f"{path.name} is not there")
    except (OSError, UnicodeDecodeError) as fault:
        missing.append(f"{path.name} cannot be read: {fault}")
    return ""


def _load(path: Path, missing: list[str]) -> Any:
    text = _text(path, missing)
    try:
        return json.loads(text or "{}") if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, RecursionError):
        missing.append(f"{path.name} is cut off or not valid")
        return {}


def _lines(path: Path, missing: list[str] | None) -> tuple[Row, ...]:
    """The mappings of a JSONL file; a torn last line, as a crash leaves it, is left out and named."""
    if not path.exists():
        if missing is not None:
            missing.append(f"{path.name} is not there")
        return ()
    rows: list[Row] = []
    torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(cast(Row, row))
        else:
            torn += 1
    if torn and missing is not None:
        missing.append(f"{path.name} has {torn} torn line{'s' if torn > 1 else ''}")
    return tuple(rows)


def as_mapping(value: Any) -> Row:
    """The value itself when it is a mapping, else an empty one."""
    return cast(Row, value) if isinstance(value, Mapping) else {}


def mapping(value: Any, *path: str) -> Row:
    """The mapping at a path of keys inside nested mappings; empty when any step is absent."""
    for key in path:
        value = as_mapping(value).get(key)
    return as_mapping(value)


def number(value: Any) -> float | None:
    """A float, or None for what is no number (booleans included)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def at(value: Any, *path: str) -> float | None:
    """The finite number at a path of keys, or None."""
    found = number(mapping(value, *path[:-1]).get(path[-1]))
    return found if found is not None and math.isfinite(found) else None

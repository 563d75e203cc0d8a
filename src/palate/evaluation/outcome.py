"""What an evaluation found, and how it is written to `evaluation.json`.

The file is the JSON form of `Outcome`: every dataclass a mapping of its fields, every NaN null. Readers
should take a missing or null entry as "not measured". The parts, by path:

- `schema` 1; `baseline`, `judge`, `gold` names; `prompts`, `answers` (per prompt) counts; `notes` for people
- `models.NAME.scores.REWARD` mean with `low` and `high`, `deviation`, `abstained`
- `models.NAME.win_rate.REWARD` wins, ties, losses, `rate` with interval and p-value, against the baseline
- `models.NAME.gain.REWARD` mean score difference to the baseline with interval and p-value
- `models.NAME.kl` nats per answer from the baseline; `text`, `rouge`, `world` as measured
- `reward_models.REWARD` accuracy on held comparisons (see `reward_accuracy.RewardAccuracy`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from palate.evaluation.kl import SequenceKL
from palate.evaluation.reward_accuracy import RewardAccuracy
from palate.evaluation.statistics import Interval
from palate.evaluation.text import Rouge, TextSummary
from palate.evaluation.win_rate import Gain, WinRate

FILE = "evaluation.json"
SCHEMA = 1


@dataclass(frozen=True)
class Score:
    """One reward over one model's answers; `deviation` is over answers, the interval over prompts."""

    mean: Interval
    deviation: float
    abstained: int


@dataclass(frozen=True)
class ModelOutcome:
    """One model's answers in numbers. `win_rate` and `gain` are empty for the baseline itself."""

    scores: Mapping[str, Score]
    win_rate: Mapping[str, WinRate]
    gain: Mapping[str, Gain]
    kl: SequenceKL | None
    text: TextSummary
    rouge: Rouge | None
    world: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """Everything one evaluate stage found. `judge` is the reward that decides, `gold` the one known to be
    true.
    """

    baseline: str
    judge: str | None
    gold: str | None
    prompts: int
    answers: int
    models: Mapping[str, ModelOutcome]
    reward_models: Mapping[str, RewardAccuracy]
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Plain JSON values; a number that is not finite becomes null."""
    return _plain(asdict(outcome))


def write(outcome: Outcome, folder: Path) -> Path:
    """Write `evaluation.json` into a stage's folder."""
    path = folder / FILE
    text = json.dumps(to_json(outcome), ensure_ascii=False, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value

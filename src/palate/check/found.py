"""What a check finds, as frozen values: the page shows them and `--json` writes them, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from palate.stage_folder import State


@dataclass(frozen=True)
class Setting:
    """One resolved value by its dotted name, and who gave it: file, command line or default."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that are alike, as text with nothing invisible in it."""

    text: str
    trained: bool
    special: bool
    tokens: int


@dataclass(frozen=True)
class Counts:
    """How many cells of each sort a row or a batch has; PAD counts cells beyond the rows' ends."""

    tokens: int
    trained: int
    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class Example:
    """One row as it is trained on. `reads` is the place (from 0) of the token a reward model is read at."""

    title: str
    pieces: tuple[Piece, ...]
    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    counts: Counts
    reads: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batches:
    """The arithmetic of a stage: numbers by name, and the same in sentences."""

    numbers: Mapping[str, int]
    words: tuple[str, ...]
    turns: int = 0
    """What the number of a checkpoint counts to at the stage's end: optimiser steps, or rollouts."""


@dataclass(frozen=True)
class Memory:
    """Bytes by use. What was not measured is absent. `peak` is the most that is held at one time."""

    parameters: Mapping[str, int]
    bytes: Mapping[str, int]
    peak: int
    basis: str


@dataclass(frozen=True)
class Time:
    """Seconds by part over the whole stage, and what they were multiplied out from."""

    seconds: Mapping[str, float]
    total: float
    basis: str


@dataclass(frozen=True)
class Seen:
    """What was found out about one stage by setting it up; parts that a fault kept out of sight are absent."""

    model: str = ""
    batches: Batches | None = None
    examples: tuple[Example, ...] = ()
    batch: Counts | None = None
    rules: tuple[str, ...] = ()
    """Sentences about what is trained, read and scored."""
    memory: Memory | None = None
    time: Time | None = None
    warnings: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageFound:
    """One stage of a recipe: what will happen to it, and what was seen."""

    number: int
    name: str
    kind: str
    state: State
    settings: tuple[Setting, ...]
    seen: Seen

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the stage is done; None where they were not estimated."""
        if self.state.what == "done":
            return 0.0
        if self.seen.time is None:
            return None
        turns = self.seen.batches.turns if self.seen.batches else 0
        rest = 1 - self.state.step / turns if turns else 1.0
        set_up = self.seen.time.seconds.get("setting up", 0.0)
        return set_up + (self.seen.time.total - set_up) * max(rest, 0.0)


@dataclass(frozen=True)
class RecipeFound:
    """A whole recipe. `settings` are those common to its stages."""

    recipe: str
    folder: str
    settings: tuple[Setting, ...]
    stages: tuple[StageFound, ...]
    faults: tuple[str, ...] = ()

    @property
    def all_faults(self) -> tuple[str, ...]:
        """Every fault, of the recipe and of its stages."""
        return (*self.faults, *(fault for stage in self.stages for fault in stage.seen.faults))

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """Every warning of its stages."""
        return tuple(warning for stage in self.stages for warning in stage.seen.warnings)

    @property
    def seconds(self) -> float | None:
        """Estimated seconds of what is left to do; None where a stage could not be estimated."""
        left = [stage.seconds_left for stage in self.stages]
        return sum(s for s in left if s is not None) if None not in left else None

    @property
    def peak(self) -> int:
        """The most bytes that a stage which would run holds at one time."""
        return max((s.seen.memory.peak for s in self.stages if s.seen.memory and s.state.what != "done"), default=0)


@dataclass(frozen=True)
class ModelFound:
    """A model folder on its own."""

    model: str
    facts: Mapping[str, Any]
    memory: Memory
    tokens: Mapping[str, str]
    sample: Example | None
    """A greedy answer to a greeting; None where the model does not write."""
    warnings: tuple[str, ...] = ()


def document(kind: str, found: Any, **more: Any) -> dict[str, Any]:
    """The JSON document of `--json`: `what` was checked, `healthy`, and every field of what was found."""
    return {"what": kind, **more, **asdict(found)}

"""A run of one stage from flat settings: `learning_rate=1e-5` finds its place by itself.

The verbs of the command line and the Python door take every setting at the top. A name that the stage does not have
is looked for in its algorithm, then in its groups of settings (optimiser, sampling, …); a name that two groups have
must be written out, as in `optimiser.eps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from palate import settings
from palate.run import Experiment
from palate.settings import PalateError, Settings

STAGE = "stages.0"


@dataclass(frozen=True)
class OneStage:
    """A stage of some kind, with an algorithm where the kind has one, that settings are to be placed in."""

    kind: str
    name: str
    algorithm: str | None = None

    def given(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The experiment that flat settings describe: run settings at the top, everything else in its place."""
        stage: dict[str, Any] = {"kind": self.kind, "name": self.name}
        if self.algorithm is not None:
            stage["algorithm"] = {"kind": self.algorithm}
        experiment: dict[str, Any] = {"name": self.name, "stages": [stage]}
        for name, value in flat.items():
            _put(experiment, self.place(name).split("."), value)
        return experiment

    def place(self, name: str) -> str:
        """The full dotted name of a setting (or of an assignment to it) given at the top."""
        first = name.partition("=")[0].partition(".")[0]
        if first in Experiment.model_fields:
            return name
        stage = settings.find("stages", self.kind)
        if first in stage.model_fields:
            return f"{STAGE}.{name}"
        if self.algorithm is not None and first in self._known_to_the_algorithm():
            return f"{STAGE}.algorithm.{name}"
        owners = [group for group, cls in _groups(stage) if first in cls.model_fields]
        if len(owners) == 1:
            return f"{STAGE}.{owners[0]}.{name}"
        if owners:
            choices = " or ".join(f"{owner}.{first}" for owner in owners)
            raise PalateError(f"{first}: several groups of settings have it. Write {choices}.")
        raise PalateError(settings.unknown(first, self.known()))

    def known(self) -> Iterator[str]:
        """Every name that may be given at the top."""
        stage = settings.find("stages", self.kind)
        yield from (name for name in Experiment.model_fields if name != "stages")
        yield from (name for name in stage.model_fields if name not in ("kind", "name"))
        if self.algorithm is not None:
            yield from (name for name in self._algorithm().model_fields if name != "kind")
        for _, group in _groups(stage):
            yield from group.model_fields

    def _known_to_the_algorithm(self) -> set[str]:
        """The names of its settings, and those that it understands because users bring them from elsewhere."""
        cls = self._algorithm()
        return {*cls.model_fields, *getattr(cls, "other_names", {})}

    def _algorithm(self) -> type[Settings]:
        assert self.algorithm is not None
        return settings.find("algorithms", self.algorithm)


def _groups(stage: type[BaseModel]) -> Iterator[tuple[str, type[Settings]]]:
    """The groups of settings of a stage; what may also be a plain text, like a model's folder, is no group."""
    for name, field in stage.model_fields.items():
        for kind in {field.annotation, *get_args(field.annotation)} if str not in get_args(field.annotation) else ():
            if isinstance(kind, type) and issubclass(kind, Settings) and len(kind.model_fields) > 1:
                yield name, kind


def _put(target: Any, path: list[str], value: Any) -> None:
    """Set a value at a path, merging a mapping into the one that is there."""
    for part in path[:-1]:
        target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
    there = target.get(path[-1])
    if isinstance(there, dict) and isinstance(value, Mapping):
        value = {**there, **value}
    target[path[-1]] = value


def words_to_assignments(words: list[str]) -> list[str]:
    """`key=value` from any of `key=value`, `--key=value`, `--key value` and `--key` (which is true)."""
    assignments: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        dashed = word.startswith("--") and len(word) > 2
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not dashed:
                raise PalateError(f"{word!r}: write a setting as key=value, for example seed=2.")
            value = rest.pop(0) if rest and not _is_setting(rest[0]) else "true"
        assignments.append(f"{name.replace('-', '_') if dashed else name}={value}")
    return assignments


def _is_setting(word: str) -> bool:
    return word.startswith("--") or ("=" in word and word.partition("=")[0].replace(".", "_").isidentifier())

"""Faults and warnings of one stage as they come up: the check goes on as far as it can after each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

from palate.check.found import Seen
from palate.settings import PalateError

T = TypeVar("T")
P = ParamSpec("P")


class Gathered:
    """What is wrong with one stage. Each line begins with the stage's name, the place in the recipe."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.faults: list[str] = []
        self.warnings: list[str] = []

    def ask(self, question: Callable[P, T], *about: P.args, **more: P.kwargs) -> T | None:
        """The answer, or None where it is a fault that the user can mend, which is noted."""
        try:
            return question(*about, **more)
        except PalateError as fault:
            self.fault(str(fault))
            return None

    def fault(self, text: str) -> None:
        """Something with which the stage would not run, or would teach nothing."""
        self.faults.append(self._placed(text))

    def warn(self, *texts: str) -> None:
        """Things that run but deserve a look."""
        self.warnings += [self._placed(text) for text in texts]

    def _placed(self, text: str) -> str:
        return text if text.startswith((f"{self.stage}:", f"{self.stage}.", "stages.")) else f"{self.stage}: {text}"

    def onto(self, seen: Seen) -> Seen:
        """What was seen with the faults and warnings, each line once."""
        faults, warnings = tuple(dict.fromkeys(self.faults)), tuple(dict.fromkeys(self.warnings))
        return replace(seen, faults=faults, warnings=warnings)

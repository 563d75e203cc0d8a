"""Exact match as a reward: the answer is right when it says what a column of the data says."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import model_validator

from palate.rewards.reward import Answers, Verdict, verdict
from palate.settings import Choice, PalateError, nearest


class Reward(Choice):
    """`right` where the completion (or the part a pattern finds in it) equals the column, `wrong` elsewhere.

    White space around both sides does not count. Rows whose column is None are left to the other rewards.
    """

    kind: str = "exact"
    """Exact match with a column of the data."""
    column: str = "answer"
    """The column that holds the right answer."""
    pattern: str | None = None
    """A regular expression; its first group (or the whole match) is compared. No match is wrong."""
    take: Literal["first", "last"] = "last"
    """Which match counts where the pattern matches several times."""
    ignore_case: bool = False
    """Whether `Paris` equals `paris`."""
    right: float = 1.0
    """The score of a match."""
    wrong: float = 0.0
    """The score of anything else."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.pattern or "")
        except re.error as fault:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {fault}") from None
        return self

    @property
    def label(self) -> str:
        """Always `exact`."""
        return "exact"

    def score(self, answers: Answers) -> Verdict:
        """Right or wrong per answer. Raises PalateError when the data have no such column."""
        if self.column not in answers.columns:
            known = ", ".join(sorted(answers.columns)) or "none"
            raise PalateError(
                f"reward exact: the data have no column {self.column!r}."
                f"{nearest(self.column, answers.columns)} Columns: {known}. Set column to one of them."
            )
        pairs = zip(answers.completions, answers.columns[self.column], strict=True)
        return verdict(self.label, [self._judge(text, truth) for text, truth in pairs], answers)

    def _judge(self, text: str, truth: Any) -> float | None:
        if truth is None:
            return None
        found = self._found(text)
        return self.right if found is not None and self._same(found, str(truth)) else self.wrong

    def _found(self, text: str) -> str | None:
        if self.pattern is None:
            return text
        matches = list(re.finditer(self.pattern, text, re.DOTALL))
        if not matches:
            return None
        match = matches[-1 if self.take == "last" else 0]
        return match.group(1) if match.re.groups else match.group(0)

    def _same(self, one: str, other: str) -> bool:
        one, other = one.strip(), other.strip()
        return one.casefold() == other.casefold() if self.ignore_case else one == other

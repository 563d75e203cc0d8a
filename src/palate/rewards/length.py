"""Length as a reward: what an answer pays for being too short or too long."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from palate.rewards.reward import Answers, Verdict, verdict
from palate.settings import Choice


class Reward(Choice):
    """Minus `per_unit` for every unit outside [at_least, at_most], at most `largest`; 0 inside."""

    kind: str = "length"
    """A penalty on length."""
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """What is counted: sampled tokens (the end token included), words between white space, or characters."""
    at_least: int = Field(default=0, ge=0)
    """Shorter answers pay."""
    at_most: int | None = Field(default=None, ge=1)
    """Longer answers pay; none lets them be as long as they like."""
    per_unit: float = Field(default=0.01, gt=0)
    """What one unit too few or too many costs."""
    largest: float | None = Field(default=None, gt=0)
    """The most an answer can pay; none has no bound."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.at_most is None and self.at_least == 0:
            raise ValueError("a length reward without at_least or at_most is 0 everywhere; set one of them")
        if self.at_most is not None and self.at_most < self.at_least:
            raise ValueError(f"at_most {self.at_most} is below at_least {self.at_least}")
        return self

    @property
    def label(self) -> str:
        """Always `length`."""
        return "length"

    def score(self, answers: Answers) -> Verdict:
        """The penalty of every answer, as a number at or below 0."""
        return verdict(self.label, [self._penalty(n) for n in self._lengths(answers)], answers)

    def _lengths(self, answers: Answers) -> list[int]:
        if self.unit == "tokens":
            return [int(n) for n in answers.rollouts.length_B.tolist()]
        if self.unit == "words":
            return [len(text.split()) for text in answers.completions]
        return [len(text) for text in answers.completions]

    def _penalty(self, length: int) -> float:
        short = max(0, self.at_least - length)
        long = 0 if self.at_most is None else max(0, length - self.at_most)
        cost = self.per_unit * (short + long)
        return -cost if self.largest is None else -min(cost, self.largest)

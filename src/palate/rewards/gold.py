"""The true taste of a self-made world as the reward: what no one has outside such a world."""

from __future__ import annotations

from importlib import import_module
from typing import Self

from pydantic import model_validator

from palate.rewards.calling import ask
from palate.rewards.reward import Answers, Verdict
from palate.settings import Choice, kinds, nearest


class Reward(Choice):
    """The world's own utility of an answer: for evaluation, and to see what a perfect reward would do."""

    kind: str = "gold"
    """The true utility of a self-made world."""
    world: str = "tasting_room"
    """Which world: a file of palate/worlds that has a `score` function."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        known = kinds("worlds")
        if self.world not in known:
            raise ValueError(
                f"no world is called {self.world!r}.{nearest(self.world, known)} Known: {', '.join(known)}"
            )
        return self

    @property
    def label(self) -> str:
        """Always `gold`."""
        return "gold"

    def score(self, answers: Answers) -> Verdict:
        """The utility of every answer."""
        return ask(import_module(f"palate.worlds.{self.world}").score, self.label, answers)

"""A Python function as the reward: `f(prompts, completions, **columns) -> list of numbers, lists or None`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import PlainSerializer, PrivateAttr, model_validator

from palate.rewards.calling import Function, ask, load_function
from palate.rewards.reward import Answers, Verdict
from palate.settings import Choice


def _spelled(function: Any) -> str:
    """`module:name` of a function given as an object, so that settings can be written down."""
    if isinstance(function, str):
        return function
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


class Reward(Choice):
    """Whatever a Python function says: per answer, per token, or None to leave a row to the other rewards.

    The function may be async. It is called once with all answers of a rollout; data columns arrive as lists
    by their names, as far as the function takes them, and are copies.
    """

    kind: str = "function"
    """A Python function."""
    function: Annotated[str | Callable[..., Any], PlainSerializer(_spelled)]
    """module:function, path/file.py:function, or (from Python) the function itself."""
    name: str = ""
    """What tables and metrics call it; empty takes the function's own name."""

    _function: Function = PrivateAttr()

    @model_validator(mode="after")
    def _find(self) -> Self:
        self._function = load_function(self.function) if isinstance(self.function, str) else self.function
        return self

    @property
    def label(self) -> str:
        """The function's name."""
        return self.name or getattr(self._function, "__name__", type(self._function).__name__)

    def score(self, answers: Answers) -> Verdict:
        """The function's results, checked. Raises PalateError naming the answer it stumbled over."""
        return ask(self._function, self.label, answers)

"""The manual read from the source says what the living classes say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from palate.manual import entries
from palate.run import Experiment
from palate.settings import Choice, Settings, find

CASES = {
    "run": ("Experiment", lambda: Experiment),
    "stages/online": ("Stage", lambda: find("stages", "online")),
    "stages/train": ("Stage", lambda: find("stages", "train")),
    "algorithms/ppo": ("Algorithm", lambda: find("algorithms", "ppo")),
}


def _living(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, meaning) of every setting, groups that are always groups opened."""
    for name, field in cls.model_fields.items():
        if prefix + name != "kind":
            yield prefix + name, " ".join(str(field.description).split())
            kind = field.annotation
            if isinstance(kind, type) and not get_args(kind) and Settings in kind.__bases__ and kind is not Choice:
                yield from _living(kind, f"{prefix}{name}.")


@pytest.mark.parametrize("module", CASES)
def test_names_and_meanings_are_those_of_the_classes(module: str) -> None:
    name, find_class = CASES[module]
    read = {e.name: e.meaning for e in entries(module, name)}
    assert read == dict(_living(find_class()))


def test_defaults_are_written_as_a_user_would() -> None:
    read = {e.name: e.default for e in entries("stages/online", "Stage")}
    assert read["model"] == ""
    assert read["watch"] == "none"
    assert read["rollout_batch_size"] == "64"
    assert read["optimiser.eps"] == "1e-05"
    assert read["prompts.shuffle"] == "true"
